"""A run: the stages of a config, one after the other, each resumable."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import jax
import yaml
from rich.console import Console

from r1jax.bucket import check_readable, copy_folder, on_bucket
from r1jax.compilation_cache import use_compilation_cache
from r1jax.config.lineage import needs
from r1jax.config.run_config import RunConfig
from r1jax.evaluation.results import write_results
from r1jax.evaluation.run_directory import read_run
from r1jax.files import JsonObject
from r1jax.lock import locked, refuse_locked
from r1jax.metrics.compilations import CompilationCounter, memory
from r1jax.metrics.heartbeat import HEARTBEAT
from r1jax.metrics.profiling import ProfiledSteps
from r1jax.metrics.watchdog import Watchdog
from r1jax.peers import watched_peers
from r1jax.planner.memory import check_memory, explained_out_of_memory
from r1jax.processes import (
    agree,
    any_process,
    distributed_process,
    wait_for_all,
)
from r1jax.report.ending import ending
from r1jax.report.page import write_report
from r1jax.rollouts.searching import check_search, search_question
from r1jax.run.checkpointed import find_model
from r1jax.run.example_prompt import example_prompt, reads_questions
from r1jax.run.record import Record, RunFiles, open_record, read_record
from r1jax.run.resolve import ResolvedRun, StageRun, check, load_functions, resolve
from r1jax.run.selection import EVERYTHING, Selection, likely_name
from r1jax.run.stop import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    Preempted,
    StopSignal,
    stop_on_signals,
)
from r1jax.run.tpu_compiler import unset_flags
from r1jax.settings.stage import Stage
from r1jax.sharding import given_cpu_devices, split_cpu
from r1jax.weights import hugging_face


def run(
    config: RunConfig, selection: Selection = EVERYTHING, profile: ProfiledSteps | None = None
) -> int:
    """Run or resume the selected stages and write results.json and report.html.

    Returns 0, `EXIT_PREEMPTED` or `EXIT_INTERRUPTED`. Raises ValueError or RunError, with a message
    for the user; everything finished stays on disk. `profile`: optimizer steps of train stages to
    trace.
    """
    with watched_peers():
        _agree_to_start(config, selection)
        return _run(config, selection, profile)


def review(
    config: RunConfig, selection: Selection = EVERYTHING, profile: ProfiledSteps | None = None
) -> list[Stage]:
    """The stages that `run` would run, by the run's directory, which is only read.

    Raises ValueError for what `run` refuses about the directory, and about the selection of its
    stages; loads no model.
    """
    selected = selection.stages(config)
    try:
        files = RunFiles.to_read(config)
    except (ValueError, ImportError) as error:
        raise config.refusal("output", str(error)) from error
    if not on_bucket(files.directory):
        refuse_locked(files.directory)
    return _stages_left(read_record(config, files, selection.restart), selected, profile)


def _stages_left(
    record: Record, selected: Sequence[str], profile: ProfiledSteps | None
) -> list[Stage]:
    """The selected stages that are not finished; ValueError where they cannot be run."""
    _check_needs(record, selected)
    if profile is not None:
        _check_profile(record, selected, profile)
    chosen = [stage for stage in record.config.stages if stage.name in selected]
    return [stage for stage in chosen if record.status(stage.name) != "done"]


def _agree_to_start(config: RunConfig, selection: Selection) -> None:
    """Raises DisagreementError in every process unless all run the same code, config and devices.

    Else they would wait for each other without end, or train on different data.
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
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _run(config: RunConfig, selection: Selection, profile: ProfiledSteps | None) -> int:
    HEARTBEAT.begin_stage("")  # of a former run in this process
    selected = selection.stages(config)
    # Before models are loaded; of a bucket, when it is known to be accessible. Of several processes
    # the first one opens the directory, and all hear of a refusal: a slow one would take the lock
    # of its own run for another's.
    if distributed_process() is None and not on_bucket(config.output):
        review(config, selection, profile)
    resolved = resolve(config)
    files = resolved.files
    cache = use_compilation_cache(config.compilation_cache, config.output)
    console = Console(highlight=False, quiet=jax.process_index() > 0)
    with ExitStack() as held:
        held.enter_context(_watchdog(resolved))
        references = check(resolved)
        for line in references:
            console.print(line, markup=False, soft_wrap=True)
        _lock(files, held)
        record = open_record(config, files, selection.restart)
        record.note_references(references)
        left = _stages_left(record, selected, profile)
        check_memory(resolved, left)
        if warning := unset_flags(jax.devices()[0].device_kind, os.environ):
            console.print(f"Warning: {warning}", markup=False, soft_wrap=True)
        if cache is not None and left:
            console.print(f"Compiled programs are kept in {cache}", soft_wrap=True)
        try:
            with stop_on_signals(resolved.layouts.training) as stop:
                for stage in left:
                    _leave_if_stopped(stage, stop)
                    _run_stage(stage, resolved, record, stop, profile)
        except Preempted as error:
            by = "Ctrl-C" if stop.interrupted else "SIGTERM"
            console.print(f"Stopped by {by}. {error}; the same command goes on.", soft_wrap=True)
            return EXIT_INTERRUPTED if stop.interrupted else EXIT_PREEMPTED
        finally:
            files.push()
        wait_for_all("stages")
    if jax.process_index() == 0:
        write_results(files.directory)
        report = write_report(files.directory)
        files.push()
        console.print(f"Report: {files.home(report)}", soft_wrap=True)
        said = ending(
            read_run(files.directory),
            files.home(files.directory),
            sampled=example_prompt(resolved),
            benchmarks=reads_questions(resolved),
            variable=given_cpu_devices(),
        )
        for line in said:
            console.print(line, markup=False, soft_wrap=True)
    return 0


def _lock(files: RunFiles, held: ExitStack) -> None:
    """Process 0 holds the lock of the directory for all; if it cannot, all raise ValueError.

    A bucket cannot tell whether the process that holds a lock still lives.
    """
    problem = ""
    if jax.process_index() == 0 and files.copy is None:
        try:
            held.enter_context(locked(files.directory))
        except ValueError as error:
            problem = str(error)
    if any_process(bool(problem), None):
        raise ValueError(problem or f"{files.directory}: others are running it, process 0 says who")


def _leave_if_stopped(stage: Stage, stop: StopSignal) -> None:
    if stop.in_any_process():
        raise Preempted(f"{stage.name} has not begun")


def _watchdog(run: ResolvedRun) -> AbstractContextManager[object]:
    section = run.config.watchdog
    if section is None:
        return nullcontext()
    return Watchdog(
        section.seconds,
        run.files.home(run.files.directory / "hangs"),  # at once: a process that hangs never pushes
        abort=section.abort,
        process_index=jax.process_index(),
    )


def _run_stage(
    stage: Stage, run: ResolvedRun, record: Record, stop: StopSignal, profile: ProfiledSteps | None
) -> None:
    HEARTBEAT.begin_stage(stage.name)
    directory = run.files.stage_directory(stage.name)
    directory.mkdir(parents=True, exist_ok=True)
    record.mark(stage, "running", record.seconds(stage.name))
    with CompilationCounter() as compilations:
        traced = _profiled_steps(profile, stage)
        stage_run = StageRun(
            **vars(run), directory=directory, record=record, stop=stop, profile=traced
        )
        with explained_out_of_memory(stage, run):
            load_functions(stage).run(stage, stage_run)
    record.note_machine(stage, {**compilations.figures(), **memory()})


def _profiled_steps(profile: ProfiledSteps | None, stage: Stage) -> ProfiledSteps | None:
    """What to trace of a stage in this process: process 0 traces, for all are alike."""
    if profile is None or profile.stage not in (None, stage.name) or jax.process_index() > 0:
        return None
    return profile


def _check_needs(record: Record, selected: Sequence[str]) -> None:
    """Refuses a selection whose stages need a result that is not there."""
    for name in selected:
        for need in needs(record.config, name):
            if need not in selected and record.status(need) != "done":
                raise ValueError(
                    f"the stage {name} needs {need}, which is not finished; run it first "
                    f"(--from {need}), or without a selection"
                )


def _check_profile(record: Record, selected: Sequence[str], profile: ProfiledSteps) -> None:
    """Refuses steps that no train stage of this call will take."""
    where, files = f"--profile-steps {profile}", record.files
    stages = [stage for stage in record.config.stages if stage.DESCRIPTION.trains]
    names = [stage.name for stage in stages]
    if profile.stage is not None and profile.stage not in names:
        likely = likely_name(profile.stage, names)
        raise ValueError(f"{where}: {profile.stage} is no train stage; {likely}")
    reasons = []
    for stage in stages:
        if profile.stage not in (None, stage.name):
            continue
        if stage.name not in selected:
            reasons.append(f"{stage.name} is not selected")
        elif record.status(stage.name) == "done":
            reasons.append(f"{stage.name} is finished")
        else:
            # Where epochs are given, the steps are known when the data is counted.
            steps = stage.planned_steps() or profile.first
            done = files.newest_checkpoint(stage.name)
            if done < profile.last and profile.first <= steps:
                return
            reasons.append(f"{stage.name} goes from step {done + 1} to {steps}")
    why = "; ".join(reasons) or "none trains"
    raise ValueError(f"{where}: no stage takes these steps ({why})")


def export_run(
    run_dir: Path, destination: Path, stage: str | None = None, dtype: str | None = None
) -> Path:
    """Copy the Hugging Face directory of a stage; default: the last that left a language model.

    run_dir: or RUN_DIR@STEP, a kept checkpoint; see `find_model`.
    dtype: as numpy names it, or `fp8` (`hugging_face.convert`); default: the same.
    """
    if destination.exists():
        raise ValueError(f"{destination} exists; name a new directory")
    directory = hugging_face.resolve(find_model(str(run_dir), stage).path)
    if dtype is None:
        copy_folder(directory, destination, last="config.json")
    else:
        hugging_face.convert(directory, destination, dtype)
    return destination


def free_name(config: RunConfig, model: str) -> str:
    """A name for the evaluation of a model whose directory is not that of another model's."""
    last = [part for part in re.split(r"[/\\]", model) if part not in ("", "model")][-1:]
    slug = re.sub(r"[^A-Za-z0-9_.\-]+", "-", last[0] if last else "model")
    code = hashlib.sha256(model.encode()).hexdigest()[:8]
    names = [config.name, f"{config.name}-{slug}", f"{config.name}-{slug}-{code}"]
    try:
        output = check_readable(config.output)
    except (ValueError, ImportError) as error:
        raise config.refusal("output", str(error)) from error
    for name in names:
        recorded = output / f"{name}-s{config.seed}" / "config.yaml"
        if not recorded.is_file():
            return name
        text = yaml.safe_load(recorded.read_text(encoding="utf-8"))
        if isinstance(text, dict) and (text.get("model") or {}).get("path") == model:
            return name
    return names[-1]


def search_config(
    config: RunConfig, model_path: str, stage_name: str | None
) -> tuple[RunConfig, Stage]:
    """The config with the weights at `model_path` for a stage with `search`, and the stage.

    stage_name: default: the last one. Its reward models may be those of other stages of the run.
    """
    stages = [stage for stage in config.stages if stage.dataset_search() is not None]
    names = [stage.name for stage in stages]
    if stage_name is not None and stage_name not in names:
        raise ValueError(f"--stage {stage_name}: no stage with search; there are {names}")
    if not stages:
        raise ValueError(
            "no stage of the config has search: {kind: beam, ...} or {kind: mcts, ...}"
        )
    chosen = stages[-1 if stage_name is None else names.index(stage_name)]
    searched = chosen.model_copy(update={"weights": _SEARCHED})
    origin = {"path": model_path, "config": None, "tokenizer": model_path}
    section = config.section_of(config.model_of(chosen.name)).model_copy(update=origin)
    changes: JsonObject = {"models": {**config.models, _SEARCHED: section}}
    changes["stages"] = [searched if each is chosen else each for each in config.stages]
    return config.model_copy(update=changes), searched


def search_prompt(
    config: RunConfig, stage: Stage, question: str, directory: Path | None
) -> tuple[str, JsonObject]:
    """The solution of a question as a stage searches it, and the row of its tree.

    directory: of the run whose stages trained the reward models.
    """
    run = resolve(config)
    if directory is not None:
        files = RunFiles(directory, tuple(each.name for each in config.stages))
        run = replace(run, files=files, models=replace(run.models, files=files))
    wanted = stage.dataset_search()
    assert wanted is not None
    check_search(stage, wanted, run)
    return search_question(stage, run, wanted, question)


_SEARCHED = "searched"  # the name of the model that `r1jax search` is given


def evaluation_config(config: RunConfig, model_path: str, stage_name: str | None) -> RunConfig:
    """The config that evaluates the weights at `model_path` as one evaluate stage says."""
    stages = [stage for stage in config.stages if stage.DESCRIPTION.leaves == "evaluation"]
    if stage_name is not None:
        stages = [stage for stage in stages if stage.name == stage_name]
    if not stages:
        raise ValueError(
            f"the config has no evaluate stage{f' named {stage_name!r}' if stage_name else ''}"
        )
    origin = {"path": model_path, "config": None, "tokenizer": model_path}
    changes: JsonObject = {"name": f"{config.name}-eval", "models": {}, "comparisons": []}
    changes["model"] = config.model.model_copy(update=origin)
    changes["stages"] = [stages[-1].model_copy(update={"weights": None})]
    return config.model_copy(update=changes)
