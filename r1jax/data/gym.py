"""Tasks of reasoning-gym as a source of rows: `gym:NAME`.

A row is remade from its index where it is scored (`r1jax.rewards.gym`), since what the task keeps
with an entry is more than JSON holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from r1jax.data.sources import Row, Rows
from r1jax.files import JsonObject
from r1jax.rewards.gym import GymTask, gym_dataset
from r1jax.settings.section import SettingError

ENTRIES = 10_000
"""Entries of a task without `options.size`."""


class _Entries(Sequence[Row]):
    """The entries of a task, made when they are indexed."""

    def __init__(self, task: GymTask, count: int) -> None:
        self._task, self._count = task, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        entry = gym_dataset(self._task)[at]
        answer = entry["answer"]
        return {
            "prompt": entry["question"],
            "answer": "" if answer is None else str(answer),
            "gym": {"name": self._task.name, "options": self._task.options, "index": at},
        }


def read_gym(name: str, split: str, options: JsonObject) -> Rows:
    """`gym:NAME`, a task of the package reasoning-gym, which the reward `gym` scores.

    Options: those of the task; `size` entries (default 10,000) of `seed` (default 0).

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: no such task, an option that it refuses, or another split than train.
    """
    if split != "train":
        raise SettingError(
            "split",
            "a task is one split, train. For a held out share of it set held_out_fraction in both "
            "datasets, or another options.seed",
        )
    task = GymTask(name, {"seed": 0, "size": ENTRIES, **options})
    return Rows(
        rows=_Entries(task, len(gym_dataset(task))),
        label=lambda index: f"entry {index}",
        in_memory=False,
    )
