"""What is refused before any compute: data, templates, rewards, and numbers that must divide."""

from __future__ import annotations

from r1jax.bucket import check_access
from r1jax.config.run_config import RunConfig
from r1jax.data.chat_template import check_template
from r1jax.processes import agree, process_batch_slice
from r1jax.rewards.registry import check_reward
from r1jax.run.models import Layouts
from r1jax.run.resolve import ResolvedRun, load_functions
from r1jax.settings.stage import DividedBy

_SPLITS: dict[DividedBy, str] = {
    "batch": "the mesh's split of the batch",
    "rollout_batch": "the split of the batch while sampling",
    "time": "the mesh's split of a row's time",
    "processes": "the processes that share a batch",
}


def check(run: ResolvedRun) -> None:
    """Raises ValueError for what a stage of the run could not do later."""
    config = run.config
    if run.files.copy is not None:
        check_access(config.output)
    _check_rewards(config)
    for stage in config.stages:
        load_functions(stage).check(stage, run)
    _check_examples(run)
    for model in run.models.by_name.values():
        model.abstract_params()
    check_divided(config, run.layouts)
    _check_multiples(config, "processes", process_batch_slice(run.layouts.rollout).count)


def check_divided(config: RunConfig, layouts: Layouts) -> None:
    """Raises ValueError where the mesh does not divide rows that are on the devices at once."""
    _check_multiples(config, "batch", layouts.training.shards("batch"))
    _check_multiples(config, "rollout_batch", layouts.rollout.shards("batch"))
    _check_multiples(config, "time", layouts.training.shards("time"))


def _check_multiples(config: RunConfig, by: DividedBy, parts: int) -> None:
    for stage in config.stages:
        for number in stage.divided():
            if number.by == by and number.value % parts:
                raise ValueError(
                    f"stages.{stage.name}{number.key} = {number.value} is not a multiple of "
                    f"{parts}, {_SPLITS[by]}"
                )


def _check_rewards(config: RunConfig) -> None:
    selections = (stage.reward_selection() for stage in config.stages)
    for rewards in (config.rewards, *(each for each in selections if isinstance(each, dict))):
        for name, reward in rewards.items():
            if reward.model is None:
                check_reward(reward.function or name, reward.options, config.verifier)


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
        check_template(section)
        if name in used and not config.source_stages(name):
            counts[f"data.{name}: examples"] = count = len(run.datasets.examples(name))
            if count == 0:
                raise ValueError(f"data.{name}: no examples")
    agree(counts, "Every host has to read the same data: copy it to all, or to a common place.")
