"""A run: the stages of a config, one after the other, each resumable."""

from __future__ import annotations

import difflib
import hashlib
import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from r1jax.bucket import check_access, copy_folder
from r1jax.compilation_cache import use_compilation_cache
from r1jax.config.lineage import needs
from r1jax.config.run_config import RunConfig
from r1jax.data.chat_template import check_template
from r1jax.evaluation.results import write_results
from r1jax.evaluation.run_directory import language_models
from r1jax.metrics import HEARTBEAT, CompilationCounter, ProfiledSteps, Watchdog, memory
from r1jax.peers import watched_peers
from r1jax.processes import agree, distributed_process, process_batch_slice, wait_for_all
from r1jax.report import write_report
from r1jax.rewards.registry import check_reward
from r1jax.run.context import Context, Preempted
from r1jax.settings.stage import Stage, TrainStage
from r1jax.sharding import Layout, split_cpu
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.evaluate.stage import run_evaluate
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.grpo.stage import run_grpo
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.rejection_sampling.settings import ModelRewrite, RejectionSamplingStage
from r1jax.stages.rejection_sampling.stage import check_texts, run_rejection_sampling
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.stages.reward_model.stage import preferences, run_reward_model
from r1jax.stages.sft.settings import SFTStage
from r1jax.stages.supervised import run_pretrain, run_sft
from r1jax.weights import hugging_face

EXIT_PREEMPTED = 143
"""Exit status after SIGTERM (128 + 15): the state is saved, the same command goes on."""


@dataclass(frozen=True)
class Selection:
    """Which stages of a run to run: all, one, or from one to another (both included).

    Finished stages are skipped, selected or not.
    """

    only: str | None = None
    first: str | None = None
    last: str | None = None

    def stages(self, config: RunConfig) -> list[str]:
        """The names of the selected stages, in order; ValueError for a name that is not there."""
        names = [stage.name for stage in config.stages]
        for option, name in (("--only", self.only), ("--from", self.first), ("--until", self.last)):
            if name is not None and name not in names:
                raise ValueError(f"{option} {name}: no such stage; {_meant(name, names)}")
        if self.only is not None:
            if self.first is not None or self.last is not None:
                raise ValueError("--only does not go with --from or --until")
            return [self.only]
        start = 0 if self.first is None else names.index(self.first)
        end = len(names) if self.last is None else names.index(self.last) + 1
        if start >= end:
            raise ValueError(f"--from {self.first} comes after --until {self.last}")
        return names[start:end]


EVERYTHING = Selection()


def _meant(name: str, names: Sequence[str]) -> str:
    """What a mistyped name may have been."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def run(
    config: RunConfig,
    selection: Selection = EVERYTHING,
    profile: ProfiledSteps | None = None,
) -> int:
    """Run or resume the selected stages and write results.json and report.html.

    Args:
      profile: optimizer steps of train stages to trace.

    Returns:
      0, or `EXIT_PREEMPTED`.

    Raises:
      ValueError, RunError: with a message for the user; everything finished stays on disk.
    """
    with watched_peers():
        agree_to_start(config, selection)
        return _run(config, selection.stages(config), profile)


def agree_to_start(config: RunConfig, selection: Selection) -> None:
    """Raises DisagreementError in every process unless all run the same code, config and devices.

    Or each would compile a program of its own, and they would wait for each other without end, or
    train on what is not the same.
    """
    if distributed_process() is None:
        return
    agree(
        {
            **{name: version(name) for name in ("r1jax", "jax", "jaxlib")},
            "r1jax's code": _hash_of_code(),
            "python": ".".join(platform.python_version_tuple()[:2]),
            "config": config.model_dump(mode="json"),
            "selection": asdict(selection),
        },
        "Give every host the same r1jax and packages, and the same command.",
    )
    split_cpu(config.mesh.cpu_devices)
    agree(
        {"devices of a process": jax.local_device_count()},
        "Every process needs as many devices as the others: use hosts of one kind, and on CPUs say "
        "how many, as in mesh.cpu_devices=1.",
    )


def _hash_of_code() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _run(config: RunConfig, selected: Sequence[str], profile: ProfiledSteps | None) -> int:
    HEARTBEAT.begin_stage("")  # of a former run in this process
    context = Context.resolve(config)
    context.profile = profile
    cache = use_compilation_cache(config.compilation_cache, config.output)
    console = Console(highlight=False, quiet=jax.process_index() > 0)
    with _watchdog(context):
        check(context)
        context.open_record()
        _check_needs(context, selected)
        if profile is not None:
            _check_profile(context, selected, profile)
        left = [
            stage
            for stage in config.stages
            if stage.name in selected and context.status(stage.name) != "done"
        ]
        if cache is not None and left:
            console.print(f"Compiled programs are kept in {cache}", soft_wrap=True)
        try:
            with context.stopping_on_sigterm():
                for stage in left:
                    _run_stage(stage, context)
        except Preempted as stop:
            console.print(f"Stopped by SIGTERM. {stop}; the same command goes on.")
            return EXIT_PREEMPTED
        finally:
            context.push()
            for directory in context.profiles:
                console.print(
                    f"Profile: {context.home(directory)}; to look at it: pip install xprof, and "
                    f"xprof --logdir {context.home(directory)}",
                    soft_wrap=True,
                )
        wait_for_all("stages")
    if jax.process_index() == 0:
        write_results(context.directory)
        report = write_report(context.directory)
        context.push()
        console.print(f"Report: {context.home(report)}", soft_wrap=True)
    return 0


def _watchdog(context: Context) -> AbstractContextManager[Any]:
    section = context.config.watchdog
    if section is None:
        return nullcontext()
    return Watchdog(
        section.seconds,
        context.home(context.directory / "hangs"),  # at once: a process that hangs pushes nothing
        abort=section.abort,
        process_index=jax.process_index(),
    )


def _run_stage(stage: Stage, context: Context) -> None:
    HEARTBEAT.begin_stage(stage.name)
    directory = context.stage_directory(stage.name)
    directory.mkdir(parents=True, exist_ok=True)
    context.mark(stage.name, stage.kind, "running", context.seconds(stage.name))
    with CompilationCounter() as compilations:
        if isinstance(stage, PretrainStage):
            run_pretrain(stage, context, directory)
        elif isinstance(stage, SFTStage):
            run_sft(stage, context, directory)
        elif isinstance(stage, GRPOStage):
            run_grpo(stage, context, directory)
        elif isinstance(stage, RewardModelStage):
            run_reward_model(stage, context, directory)
        elif isinstance(stage, RejectionSamplingStage):
            run_rejection_sampling(stage, context, directory)
        else:
            run_evaluate(stage, context, directory)
    context.note_machine(stage.name, {**compilations.figures(), **memory()})


def _check_needs(context: Context, selected: Sequence[str]) -> None:
    """Refuses a selection whose stages need a result that is not there."""
    for name in selected:
        for need in needs(context.config, name):
            if need not in selected and context.status(need) != "done":
                raise ValueError(
                    f"the stage {name} needs {need}, which is not finished; run it first "
                    f"(--from {need}), or without a selection"
                )


def _check_profile(context: Context, selected: Sequence[str], profile: ProfiledSteps) -> None:
    """Refuses steps that no train stage of this call will take."""
    config = context.config
    where = f"--profile-steps {profile}"
    if profile.stage is not None:
        names = [stage.name for stage in config.stages if isinstance(stage, TrainStage)]
        if profile.stage not in names:
            meant = _meant(profile.stage, names)
            raise ValueError(f"{where}: {profile.stage} is no train stage; {meant}")
    told = []
    for stage in config.stages:
        if not isinstance(stage, TrainStage) or profile.stage not in (None, stage.name):
            continue
        if stage.name not in selected:
            told.append(f"{stage.name} is not selected")
        elif context.status(stage.name) == "done":
            told.append(f"{stage.name} is finished")
        else:
            # Where epochs are given, the steps are known when the data is counted.
            steps = getattr(stage, "steps", None) or profile.first
            done = _newest_checkpoint(context.home(context.stage_directory(stage.name)))
            if done < profile.last and profile.first <= steps:
                return
            told.append(f"{stage.name} goes from step {done + 1} to {steps}")
    raise ValueError(f"{where}: no stage takes these steps ({'; '.join(told) or 'none trains'})")


def _newest_checkpoint(directory: Path) -> int:
    """The step that a stage goes on from; 0: from the start."""
    names = [path.name for path in (directory / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def check(context: Context) -> None:
    """Refuse, before any compute, what would fail later: data, templates, rewards, sharding."""
    config = context.config
    if context.copy is not None:
        check_access(config.output)
    own = [config.rewards_of(stage) for stage in config.stages if isinstance(stage, EvaluateStage)]
    for rewards in (config.rewards, *own):
        for name, reward in rewards.items():
            if reward.model is None:
                check_reward(reward.function or name, reward.options, config.verifier)
    for stage in config.stages:
        if isinstance(stage, RejectionSamplingStage):
            check_texts(stage)
        if isinstance(stage, RewardModelStage):
            model = context.model_of(stage.name)
            hugging_face.check_padding(model.tokenizer, model.generation_config)
            for _, data in stage.datasets():
                preferences(stage, data, context)
    used = dict.fromkeys(
        data
        for stage in config.stages
        if stage.kind != "reward_model"
        for _, data in stage.datasets()
    )
    for name in list(used):
        used |= dict.fromkeys(config.data[name].mixture)
    examples: dict[str, int] = {}
    for name, section in config.data.items():
        if section.mixture:
            continue
        check_template(section)
        # What a stage of this run writes is looked at when it is there.
        if name in used and not config.source_stages(name):
            examples[f"data.{name}: examples"] = count = len(context.examples(name))
            if count == 0:
                raise ValueError(f"data.{name}: no examples")
    agree(examples, "Every host has to read the same data: copy it to all, or to a common place.")
    for model in context.models.values():
        model.abstract_params()
    check_rows(config, context.layout, context.rollout_layout)
    shares = process_batch_slice(context.rollout_layout).count
    for name, count in _prompt_counts(config).items():
        if count % shares:
            raise ValueError(
                f"{name} = {count} is not a multiple of {shares}, the processes that share a batch"
            )


def check_rows(config: RunConfig, layout: Layout, rollout_layout: Layout) -> None:
    """Raises ValueError where the mesh does not divide rows that are on the devices at once."""
    shards, pieces = layout.shards("batch"), layout.shards("time")
    for name, count in _row_counts(config).items():
        if count % shards:
            raise ValueError(
                f"{name} = {count} is not a multiple of {shards}, the mesh's split of the batch"
            )
    for stage in config.stages:
        if isinstance(stage, GRPOStage):
            rows = stage.questions_per_step * stage.outputs_per_question
            shards = rollout_layout.shards("batch")
            if rows % shards:
                raise ValueError(
                    f"stages.{stage.name}: questions_per_step x outputs_per_question = {rows} is "
                    f"not a multiple of {shards}, the split of the batch while sampling"
                )
    for name, tokens in _row_lengths(config).items():
        if tokens % pieces:
            raise ValueError(
                f"{name} = {tokens} is not a multiple of {pieces}, the mesh's split of a row's time"
            )


def _row_lengths(config: RunConfig) -> dict[str, int]:
    """What a sequence axis must divide: the length of rows, or what it is a multiple of."""
    lengths: dict[str, int] = {}
    for stage in config.stages:
        if isinstance(stage, PretrainStage | SFTStage):
            lengths[f"stages.{stage.name}.row_tokens"] = stage.row_tokens
        elif isinstance(stage, GRPOStage | RewardModelStage):
            lengths[f"stages.{stage.name}.length_bucket"] = stage.length_bucket
    return lengths


def _row_counts(config: RunConfig) -> dict[str, int]:
    """What the mesh must divide: rows that are on the devices at once."""
    rows: dict[str, int] = {}
    for stage in config.stages:
        where = f"stages.{stage.name}"
        if isinstance(stage, PretrainStage | SFTStage | RewardModelStage):
            rows[f"{where}.rows_per_step / micro_batches"] = (
                stage.rows_per_step // stage.micro_batches
            )
        elif isinstance(stage, GRPOStage):
            rows[f"{where}: questions_per_step x outputs_per_question / micro_batches"] = (
                stage.questions_per_step * stage.outputs_per_question // stage.micro_batches
            )
    return rows


def _prompt_counts(config: RunConfig) -> dict[str, int]:
    """What the processes must divide: prompts that are sampled at once (a part may be padded)."""
    prompts: dict[str, int] = {}
    for stage in config.stages:
        where = f"stages.{stage.name}"
        if isinstance(stage, GRPOStage):
            phase = stage.questions_per_step * stage.mini_batches_per_rollout
            prompts[f"{where}: questions_per_step x mini_batches_per_rollout / rollout_batches"] = (
                phase // stage.rollout_batches
            )
        elif isinstance(stage, EvaluateStage):
            prompts[f"{where}.problems_per_batch"] = stage.problems_per_batch
        elif isinstance(stage, RejectionSamplingStage):
            prompts[f"{where}.prompts_per_batch"] = stage.prompts_per_batch
            if isinstance(stage.rewrite, ModelRewrite):
                prompts[f"{where}.rewrite.drafts_per_batch"] = stage.rewrite.drafts_per_batch
    return prompts


def export_run(
    run_dir: Path, destination: Path, stage: str | None = None, dtype: str | None = None
) -> Path:
    """Copy the Hugging Face directory of a stage; default: the last that left a language model.

    Args:
      dtype: of the copy's weights, as numpy names it, or `fp8` (`hugging_face.convert`); default:
        the same.
    """
    if stage is None:
        found = language_models(run_dir)
    else:
        found = sorted(run_dir.glob(f"stages/[0-9][0-9]-{stage}/model"))
    if not found:
        raise ValueError(
            f"{run_dir} has no finished train stage{f' {stage!r}' if stage else ''} to export"
        )
    if destination.exists():
        raise ValueError(f"{destination} exists; name a new directory")
    if dtype is None:
        copy_folder(found[-1], destination, last="config.json")
    else:
        fp8 = dtype == "fp8"
        hugging_face.convert(found[-1], destination, "bfloat16" if fp8 else dtype, fp8=fp8)
    return destination


def evaluation_config(config: RunConfig, model_path: str, stage_name: str | None) -> RunConfig:
    """The config that evaluates the weights at `model_path` as one evaluate stage says."""
    stages = [stage for stage in config.stages if isinstance(stage, EvaluateStage)]
    if stage_name is not None:
        stages = [stage for stage in stages if stage.name == stage_name]
    if not stages:
        raise ValueError(
            f"the config has no evaluate stage{f' named {stage_name!r}' if stage_name else ''}"
        )
    model = config.model.model_copy(
        update={"path": model_path, "config": None, "tokenizer": model_path}
    )
    stage = stages[-1].model_copy(update={"weights": None})
    name = f"{config.name}-eval"
    return config.model_copy(
        update={
            "model": model,
            "models": {},
            "stages": [stage],
            "comparisons": [],
            "name": name,
        }
    )
