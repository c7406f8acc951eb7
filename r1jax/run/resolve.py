"""A run, resolved from its config and checked before any compute; and what a stage's loop gets."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import jax
from huggingface_hub.utils.tqdm import disable_progress_bars

from r1jax.bucket import check_access
from r1jax.config.run_config import RunConfig
from r1jax.config.yaml_file import ConfigError
from r1jax.data.chat_template import check_template
from r1jax.data.padded_rows import bucket
from r1jax.metrics.profiling import ProfiledSteps
from r1jax.models.parameters import abstract_weights
from r1jax.processes import agree, process_batch_slice
from r1jax.run.datasets import Datasets
from r1jax.run.models import Layouts, Models, make_layouts, stated_positions
from r1jax.run.record import Record, RunFiles
from r1jax.run.reward_checks import (
    check_columns,
    check_functions,
    check_reward_models,
    check_rewards,
    check_rows,
)
from r1jax.run.stop import StopSignal
from r1jax.sampler import GenerateOptions
from r1jax.sampler.queue import slot_shape
from r1jax.settings.model import MODEL
from r1jax.settings.section import SettingError
from r1jax.settings.stage import TEACHER, Divided, DividedBy, Stage
from r1jax.sharding import StandIn, UnevenError, split_cpu

if TYPE_CHECKING:
    from r1jax.programs import Planning, StagePrograms
    from r1jax.settings.sampling import SamplingSection


@dataclass(frozen=True)
class ResolvedRun:
    """A config with its devices, models, datasets and files: what checks and `--dry-run` need."""

    config: RunConfig
    layouts: Layouts
    models: Models
    datasets: Datasets
    files: RunFiles


@dataclass(frozen=True)
class StageRun(ResolvedRun):
    """What the loop of one stage gets: its directory, which exists, and steps to trace, too."""

    directory: Path
    record: Record
    stop: StopSignal
    profile: ProfiledSteps | None = None

    def label_of(self, stage: Stage) -> str:
        """A stage's name, and which of the run's stages it is, for the progress bar."""
        names = [each.name for each in self.config.stages]
        return f"{stage.name} (stage {names.index(stage.name) + 1} of {len(names)})"


def resolve(
    config: RunConfig,
    devices: Sequence[jax.Device] | None = None,
    stands_for: StandIn | None = None,
) -> ResolvedRun:
    """Raises ValueError where mesh, devices, models, tokenizers and vocabularies do not fit.

    Args:
      devices: those of the run, and what they stand in for; default: all that there are.
    """
    if devices is None:
        split_cpu(config.mesh.cpu_devices)
    try:
        layouts = make_layouts(config.mesh, devices, stands_for)
    except ValueError as error:
        hint = "" if "devices" not in str(error) else " (`r1jax plan`: of other slices)"
        raise ConfigError([f"{config.place(('mesh',))}{error}{hint}"]) from error
    if jax.process_index() > 0:  # the bars of downloads are process 0's, as ours are
        disable_progress_bars()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    try:
        files = RunFiles.of(config)
    except (ValueError, ImportError) as error:
        raise config.refusal("output", str(error)) from error
    models = Models.resolve(config, layouts, files)
    return ResolvedRun(config, layouts, models, Datasets(config, files), files)


class _StageFunctions(Protocol):
    """The functions of a kind of stage; `r1jax.stages` says what each of them does."""

    def check(self, stage: Stage, run: ResolvedRun) -> None:
        """Raises ValueError for what the stage could not do; before any stage computes."""

    def programs(self, stage: Stage, planning: Planning) -> StagePrograms:
        """What the stage compiles, and what it keeps in memory."""

    def run(self, stage: Stage, run: StageRun) -> None:
        """Does the stage's work, going on where a former process stopped."""


def load_functions(stage: Stage) -> _StageFunctions:
    """The functions of a stage's kind: of the module that it names, or that defines it."""
    module = type(stage).FUNCTIONS or type(stage).__module__
    return cast(_StageFunctions, importlib.import_module(module))


_SPLITS: dict[DividedBy, str] = {
    "batch": "the mesh's split of the batch",
    "rollout_batch": "the split of the batch while sampling",
    "time": "the mesh's split of a row's time",
    "processes": "the processes that share a batch",
}


def check(run: ResolvedRun) -> list[str]:
    """Raises ValueError for what a stage of the run could not do later.

    Returns:
      A line for each dataset whose reference answers were read: how many cannot be.
    """
    config = run.config
    _check_output(run)
    check_trackers(config)
    check_rewards(config)
    _check_weights(run)  # of which the stages' checks may ask for the layout
    for stage in config.stages:
        load_functions(stage).check(stage, run)
    _check_examples(run)
    check_divided(config, run.layouts)
    columns = check_functions(config)
    check_reward_models(config, run.layouts.training)
    lines = check_rows(config, run.models, run.datasets)
    check_columns(config, run.datasets, columns)
    _check_positions(run)
    _check_cache_budgets(run)
    return lines


def _check_output(run: ResolvedRun) -> None:
    """Raises ConfigError where the run's directory cannot be made; of a slice that is not there,
    only for a bucket."""
    config = run.config
    if run.files.copy is not None:
        try:
            check_access(config.output)
        except ValueError as error:
            raise config.refusal("output", str(error)) from error
        return
    if run.layouts.training.stands_for is not None:
        return
    home = run.files.directory.absolute()
    there = next(path for path in (home, *home.parents) if os.path.lexists(path))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".r1jax-", dir=there))
    except OSError as error:
        raise config.refusal(
            "output",
            f"no directory can be made in {there} ({error.strerror}); give a directory that can be "
            "written to, or that can be made",
        ) from error


def _check_weights(run: ResolvedRun) -> None:
    """Raises ConfigError where the mesh, or that for sampling, does not divide a weight."""
    config, mesh = run.config, run.config.mesh
    set_here, devices = mesh.model_fields_set, mesh.cpu_devices == jax.device_count()
    for model in run.models.by_name.values():
        try:
            abstract_weights(model.decoder)
        except UnevenError as error:
            key = _axis_of(error, mesh.axes if "axes" in set_here else {})
            if "cpu_devices" in set_here and devices:
                key = ["cpu_devices"]
            raise config.refusal(["mesh", *key], f"the weight {error}") from error
    samples = {config.model_of(stage.name) for stage in config.stages if stage.longest_sample()}
    for name in samples:
        try:
            abstract_weights(run.models.sampler_of(name).decoder)
        except UnevenError as error:
            key = [] if mesh.rollout is None else ["rollout", *_axis_of(error, mesh.rollout.axes)]
            raise config.refusal(
                ["mesh", *key], f"while sampling, the weight {error} or mesh.rollout.rules"
            ) from error


def _axis_of(error: UnevenError, axes: Mapping[str, int]) -> list[str]:
    """The key, behind `mesh` or `mesh.rollout`, of an axis that does not divide a weight."""
    sized = [axis for axis in error.mesh_axes if axes.get(axis, 1) != 1]
    return ["axes", sized[0]] if sized else ["axes"] if axes else []


def check_trackers(config: RunConfig) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    installed = "wandb" in sys.modules or importlib.util.find_spec("wandb") is not None
    if "wandb" in config.trackers and not installed:
        problem = "wandb is not installed: pip install 'r1jax[wandb]', or leave it out of trackers"
        raise config.refusal("trackers", problem)


def _teachers(stage: Stage) -> list[str]:
    """Where weights come from that read the stage's samples, too."""
    return [use.source for use in stage.other_weights() if use.gives == TEACHER]


def _check_positions(run: ResolvedRun) -> None:
    """Raises ConfigError where a prompt and its completion are longer than the model may read."""
    config = run.config
    readers = [
        (stage, source) for stage in config.stages for source in (stage.name, *_teachers(stage))
    ]
    for stage, reader in readers:
        model, new = run.models.of(reader), stage.longest_sample()
        positions = stated_positions(model.section)
        if positions is None or not new:
            continue
        for data in dict.fromkeys(
            p for d in stage.prompt_datasets() for p in run.datasets.parts(d)
        ):
            if new + config.data[data].max_prompt_tokens <= positions:
                continue
            longest = _longest_prompt(run, data, reader)
            if longest + new > positions:
                section = config.model_of(reader)
                key, remedy = "max_new_tokens", "max_new_tokens"
                limit: object = getattr(stage, "max_new_tokens", new)
                if getattr(stage, "turns", None):
                    key, remedy, limit = "turns", "their tokens together", new
                # Several samples may follow each other: `new` is a multiple of the setting.
                times = new // limit if isinstance(limit, int) else 1
                where = section if section == MODEL else f"models.{section}"
                raise config.refusal(
                    f"stages.{stage.name}.{key}",
                    f"with the prompts of data.{data}, of up to {longest} tokens, a sample has "
                    f"{longest + new}, and the model max_position_embeddings = {positions}. Set "
                    f"{remedy} to at most {max(1, (positions - longest) // times)}, or "
                    f"{where}.max_position_embeddings if the model is to go further",
                )


def _longest_prompt(run: ResolvedRun, data: str, reader: str) -> int:
    """Tokens; 1 for a dataset that a stage of the run will write."""
    if run.config.source_stages(data):
        return 1
    prompts, _ = run.datasets.prompts(data, run.models.of(reader).tokenizer)
    return max(len(prompt.token_ids) for prompt in prompts)


def _check_cache_budgets(run: ResolvedRun) -> None:
    """Raises ConfigError where the budget of a KV cache has no room for a sample of the longest
    prompt, with one slot for each part of the devices: a queue may have fewer than are set."""
    for stage in run.config.stages:
        sampling: SamplingSection | None = getattr(stage, "sampling", None)
        new: int | None = getattr(stage, "max_new_tokens", None)
        if sampling is None or new is None or sampling.cache_tokens is None:
            continue
        begun, search = 0, stage.dataset_search()
        if search is not None:  # which samples steps, of solutions that have begun
            new, begun = search.search.max_step_tokens, new - search.search.max_step_tokens
        model = run.models.sampler_of(stage.name).decoder
        options = GenerateOptions(
            samples=1,
            max_new_tokens=new,
            seed=0,
            speculative=sampling.speculative,
            slots=model.layout.shards("slots"),
            cache_tokens=sampling.cache_tokens,
        )
        parts = [p for data in stage.prompt_datasets() for p in run.datasets.parts(data)]
        longest = max((_longest_prompt(run, data, stage.name) for data in parts), default=1)
        with run.config.blaming("stages", stage.name):
            try:
                tokens = bucket(longest + begun)
                slot_shape(model, options, prompts=sys.maxsize, prompt_tokens=tokens)
            except ValueError as error:
                problem = str(error).partition(": ")[2]
                problem += ", more with more slots; raise it, or leave it out"
                raise SettingError("sampling.cache_tokens", problem) from error


def _parts(layouts: Layouts, by: DividedBy) -> int:
    """Into how many parts a number of a stage is split."""
    layout = layouts.rollout if by == "rollout_batch" else layouts.training
    return layout.shards("time" if by == "time" else "batch")


def check_divided(
    config: RunConfig, layouts: Layouts, stages: Sequence[Stage] | None = None
) -> None:
    """Raises ConfigError where the mesh does not divide rows that are on the devices at once.

    stages: default: all.
    """
    chosen = config.stages if stages is None else stages
    numbers = [(stage, number) for stage in chosen for number in stage.divided()]
    problems = [
        _not_divided(config, stage, number, parts)
        for stage, number in numbers
        if number.by != "processes" and number.value % (parts := _parts(layouts, number.by))
    ]
    processes = process_batch_slice(layouts.rollout).count
    problems += [
        _not_divided(config, stage, number, processes)
        for stage, number in numbers
        if number.by == "processes" and number.value % processes
    ]
    if problems:
        raise ConfigError(problems)


def _not_divided(config: RunConfig, stage: Stage, number: Divided, parts: int) -> str:
    keys = re.findall(r"\w+", number.key)
    place, remedy = config.place(("stages", stage.name, *keys[:1])), number.remedy(parts)
    return (
        f"{place}stages.{stage.name}{number.key} = {number.value} is not a multiple of {parts}, "
        f"{_SPLITS[number.by]}; change one of the two"
        + (f", such as stages.{stage.name}.{remedy}" if remedy else "")
    )


def _check_examples(run: ResolvedRun) -> None:
    """Datasets of examples are there, not empty, and the same for all processes.

    Those that a stage of the run writes are looked at when they are there.
    """
    config = run.config
    names = [data for stage in config.stages for data in stage.example_datasets()]
    used = {part for name in names for part in run.datasets.parts(name)}
    counts: dict[str, int] = {}
    for name, section in config.data.items():
        if section.mixture:
            continue
        with config.blaming("data", name):
            check_template(section)
        if name in used and not config.source_stages(name):
            counts[f"data.{name}: examples"] = count = len(run.datasets.examples(name))
            if count == 0:
                raise config.refusal(("data", name, "source"), "no examples")
    agree(counts, "Every host has to read the same data: copy it to all, or to a common place.")
