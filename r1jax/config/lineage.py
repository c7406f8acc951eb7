"""What each stage's result depends on: the schedule as a graph, read off the config.

A stage depends on its own settings, its model, the datasets and rewards that it names, and on the
stages that its weights and datasets come from; not on what it prints or its layout on devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from r1jax.config.run_config import RunConfig
from r1jax.files import JsonObject
from r1jax.settings.data import DataSection
from r1jax.settings.kinds import load_kind
from r1jax.settings.model import MODEL, ModelSection
from r1jax.settings.rewards import RewardSection
from r1jax.settings.section import Section
from r1jax.settings.stage import EXTENDABLE


@dataclass(frozen=True)
class Edge:
    """What `source` (a stage or a model) gives: `weights`, `data`, `reward`, or what it is to the
    stage, such as `rewriter`, `teacher` or `critic`."""

    source: str
    target: str
    gives: str


def edges(config: RunConfig) -> list[Edge]:
    """All edges of the schedule, in the order of the stages."""
    found: list[Edge] = []
    for stage in config.stages:
        found.append(Edge(config.weights_of(stage.name), stage.name, "weights"))
        sources = [s for _, data in stage.datasets() for s in config.source_stages(data)]
        found += [Edge(source, stage.name, "data") for source in dict.fromkeys(sources)]
        found += [Edge(use.source, stage.name, use.gives) for use in stage.other_weights()]
        reward_models = dict.fromkeys(config.reward_stages(stage).values())
        found += [Edge(model, stage.name, "reward") for model in reward_models]
    return found


def needs(config: RunConfig, name: str) -> list[str]:
    """The stages that must be finished before the stage `name` can run, in their order."""
    sources = {edge.source for edge in edges(config) if edge.target == name}
    return [stage.name for stage in config.stages if stage.name in sources]


def ingredients(config: RunConfig, name: str) -> JsonObject:
    """Everything that decides the result of a stage, as JSON; equal for equal results."""
    stage = config.stage(name)
    datasets = dict.fromkeys(data for _, data in stage.datasets())
    for data in list(datasets):
        datasets |= dict.fromkeys(config.data[data].mixture)
    rewards = config.rewards_of(stage)
    model = config.model_of(name)
    section = config.section_of(model)
    return {
        "seed": config.seed,
        f"stages.{name}": stage.model_dump(mode="json"),
        "model" if model == MODEL else f"models.{model}": section.model_dump(mode="json"),
        **{f"data.{data}": config.data[data].model_dump(mode="json") for data in datasets},
        **{f"rewards.{key}": reward.model_dump(mode="json") for key, reward in rewards.items()},
        **{f"({source})": ingredients(config, source) for source in needs(config, name)},
    }


_OF_SOURCES = re.compile(r"^(\([^()]*\)\.)+")  # `(rl).(sft).`, as `ingredients` nests them


def changes(before: JsonObject, config: RunConfig, name: str) -> list[str]:
    """What decides the result of the stage `name` and is not what it began with.

    Settings that decide none are left out (`Stage.FREE`), and so are those that did not exist when
    it began and have their default. A setting of a stage that this one rests on is named as its own
    would be, and once.
    """
    lines = differences(_deciding(before), _deciding(ingredients(config, name)))
    return list(dict.fromkeys(map(_worded, lines)))


def _worded(line: str) -> str:
    """A line of `differences` of two ingredients, as a user would name what differs."""
    line = _OF_SOURCES.sub("", line)
    whole = re.match(r"\(([^()]*)\): (None -> )?", line)  # all of a source: there, or not there
    if whole is None:
        return line
    return f"it rests on {whole[1]} {'now' if whole[2] else 'no longer'}"


def extension(before: JsonObject, config: RunConfig, name: str) -> bool:
    """Whether all that differs is the length of the train stage, which shapes no learning rate."""
    stage = config.stage(name)
    optimizer = getattr(stage, "optimizer", None)
    if not stage.DESCRIPTION.trains or getattr(optimizer, "schedule", "") != "constant":
        return False
    lengths = [f"stages.{name}.{key}: " for key in EXTENDABLE]
    lines = changes(before, config, name)
    return all(any(line.startswith(length) for length in lengths) for line in lines) and not any(
        "None" in line for line in lines
    )


def _deciding(tree: JsonObject) -> JsonObject:
    """Ingredients without what decides nothing; those of an earlier version with newer defaults."""
    result: JsonObject = {}
    for key, value in tree.items():
        if key.startswith("("):
            result[key] = _deciding(value)
        else:
            result[key] = _complete(key, value)
    return result


def _complete(key: str, value: object) -> object:
    kinds: dict[str, type[Section]] = {
        **{MODEL: ModelSection, "models": ModelSection},
        **{"data": DataSection, "rewards": RewardSection},
    }
    try:
        section = kinds.get(key.partition(".")[0])
        if key.startswith("stages.") and isinstance(value, dict):
            section = load_kind(str(value["kind"]))
        if section is None:
            return value
        return section.model_validate(value).model_dump(mode="json", exclude=set(section.FREE))
    except (ValueError, LookupError):  # of another version, or of a kind that is gone
        return value


def differences(before: object, after: object, path: str = "") -> Iterator[str]:
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
