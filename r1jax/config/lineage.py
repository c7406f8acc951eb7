"""What each stage's result depends on: the schedule as a graph, read off the config.

A stage depends on its own settings, its model, the datasets and rewards that it names, and on the
stages that its weights and datasets come from. Where a run looks on, what it prints and how it is
laid out on devices changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from r1jax.config.run_config import RunConfig, datasets_of
from r1jax.settings.model import MODEL
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.rejection_sampling.settings import ModelRewrite, RejectionSamplingStage


@dataclass(frozen=True)
class Edge:
    """What `source` (a stage or a model) gives the stage `target`.

    gives: `weights`, `data`, `rewriter` or `reward`.
    """

    source: str
    target: str
    gives: str


def edges(config: RunConfig) -> list[Edge]:
    """All edges of the schedule, in the order of the stages."""
    found: list[Edge] = []
    for stage in config.stages:
        found.append(Edge(config.weights_of(stage.name), stage.name, "weights"))
        sources = [s for _, data in datasets_of(stage) for s in config.source_stages(data)]
        found += [Edge(source, stage.name, "data") for source in dict.fromkeys(sources)]
        if isinstance(stage, RejectionSamplingStage) and isinstance(stage.rewrite, ModelRewrite):
            found.append(Edge(stage.rewrite.weights, stage.name, "rewriter"))
        if isinstance(stage, GRPOStage | RejectionSamplingStage | EvaluateStage):
            judges = config.reward_stages(stage.rewards).values()
            found += [Edge(judge, stage.name, "reward") for judge in dict.fromkeys(judges)]
    return found


def needs(config: RunConfig, name: str) -> list[str]:
    """The stages that must be finished before the stage `name` can run, in their order."""
    sources = {edge.source for edge in edges(config) if edge.target == name}
    return [stage.name for stage in config.stages if stage.name in sources]


def ingredients(config: RunConfig, name: str) -> dict[str, Any]:
    """Everything that decides the result of a stage, as JSON; equal for equal results."""
    stage = config.stage(name)
    datasets = dict.fromkeys(data for _, data in datasets_of(stage))
    for data in list(datasets):
        datasets |= dict.fromkeys(config.data[data].mixture)
    rewards = {}
    if isinstance(stage, GRPOStage | RejectionSamplingStage | EvaluateStage):
        rewards = config.rewards_of(stage.rewards)
    model = config.model_of(name)
    section = config.model if model == MODEL else config.models[model]
    return {
        "seed": config.seed,
        f"stages.{name}": stage.model_dump(mode="json"),
        "model" if model == MODEL else f"models.{model}": section.model_dump(mode="json"),
        **{f"data.{data}": config.data[data].model_dump(mode="json") for data in datasets},
        **{f"rewards.{key}": reward.model_dump(mode="json") for key, reward in rewards.items()},
        **{f"({source})": ingredients(config, source) for source in needs(config, name)},
    }


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Each value that is not the same in two JSON trees: `key.path: old -> new`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            here = f"{path}.{key}" if path else str(key)
            yield from differences(before.get(key), after.get(key), here)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}.{index}")
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"
