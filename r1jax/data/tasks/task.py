"""The interface of procedural tasks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

from r1jax.data.example import Example, Split
from r1jax.files import JsonObject
from r1jax.settings.names import nearest
from r1jax.settings.section import SettingError

HELD_OUT_SHARE = 0.1
"""Share of the problem space that is held out, by `split_of`; the same for every task."""


class Task(Protocol):
    """A frozen dataclass whose fields are the task's options.

    `example` is a pure function of (options, index, split). There is no seed: the ranges of two
    seeds would soon overlap. A run's seed only decides the order in which it visits the examples.
    """

    alphabet: ClassVar[str]
    """Every character of a prompt, an answer or a text, except tags."""

    def example(self, index: int, split: Split) -> Example:
        """The index-th example of a split; any index >= 0 has one."""
        ...


@runtime_checkable
class PreferenceTask(Protocol):
    """A task that also has preferences, to train reward models on."""

    def pair(self, index: int, split: Split) -> tuple[str, str, str]:
        """Prompt, better and worse response of the index-th pair; ValueError if there are none."""
        ...

    def labelled(self, index: int, split: Split) -> tuple[str, str, bool]:
        """Prompt, response and whether it is safe; ValueError if there are none."""
        ...


def task_options(kind: type[Task], options: JsonObject) -> Task:
    """Builds a task from a config's `options`; SettingError for an unknown one or a bad value."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            problem = f"no option of this task; {nearest(name, known)}known: {', '.join(known)}"
            raise SettingError(f"options.{name}", problem)
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise SettingError("options", str(error)) from error
