"""Reward for tasks of reasoning-gym, by each task's own function: data from `gym:NAME`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol, TypeAlias

from r1jax.rewards.extraction import final_answer
from r1jax.rewards.registry import (
    Outcome,
    RewardInput,
    RewardOptions,
    Score,
    refuse_unknown,
    reward,
)

GymEntry: TypeAlias = dict[str, Any]
"""`question`, `answer` and `metadata`, which JSON may not hold."""


class GymDataset(Protocol):
    """A task of reasoning-gym: entries with question, answer and metadata, and how to score."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> GymEntry: ...
    def score_answer(self, answer: str | None, entry: GymEntry) -> float: ...


@dataclass(frozen=True)
class GymTask:
    """A task by its name in reasoning-gym, with its options, `seed` and `size` among them."""

    name: str
    options: Mapping[str, Any]


def gym_dataset(task: GymTask) -> GymDataset:
    """The task; equal ones are made once.

    Raises:
      ImportError: the package reasoning-gym is not installed.
      ValueError: there is no such task, or it refuses an option.
    """
    return _gym_dataset(task.name, json.dumps(task.options, sort_keys=True))


@lru_cache(maxsize=64)
def _gym_dataset(name: str, options: str) -> GymDataset:
    package = _package()
    try:
        dataset: GymDataset = package.create_dataset(name, **json.loads(options))
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"source = 'gym:{name}': {error}") from error
    return dataset


def _package() -> ModuleType:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"gym:NAME and the reward gym: {error.name} is missing; pip install 'r1jax[gym]' (or "
            "reasoning-gym)"
        ) from error
    return reasoning_gym


def _check(options: RewardOptions) -> None:
    refuse_unknown("gym", options, ())


def _prepare(options: RewardOptions) -> None:
    _package()


@reward("gym", check=_check, prepare=_prepare, reads_answer=False, reads_columns=True)
def gym(row: RewardInput, options: RewardOptions) -> Score:
    """What the task's `score_answer` gives the final answer, mostly 0 .. 1; right at 1.

    Raises:
      ValueError: the row is not of a source `gym:NAME`.
    """
    source = row.columns.get("gym")
    if not isinstance(source, Mapping):
        raise ValueError("the row has no column 'gym': its data is not of a source gym:NAME")
    dataset = gym_dataset(GymTask(source["name"], source["options"]))
    entry = dataset[source["index"]]
    if row.question is not None and entry["question"] not in row.question:
        raise ValueError("reasoning-gym makes another question of this row than when it was read")
    extracted = final_answer(row.completion)
    if extracted is None:
        return Score(0.0, Outcome.UNPARSEABLE)
    value = float(dataset.score_answer(extracted, entry))
    return Score(value, Outcome.RIGHT if value >= 1 else Outcome.WRONG, extracted)
