"""The interface of subjects with right answers: problems, worked solutions and guesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")

Draw = Callable[[], float]
"""The next number of a stream, in [0, 1)."""

Slips = Callable[[str], bool]
"""Begins a step of the kind that it is given; answers whether the step goes wrong.

The caller decides which language the step is in, and a step goes wrong more often in the language
that its kind is hard in, so that the two choices belong together.
"""


class Problem(Protocol):
    """One problem of a subject."""

    @property
    def prompt(self) -> str:
        """The question."""
        ...

    @property
    def reference(self) -> str:
        """The reference answer of the subject's reward."""
        ...

    def worked(self, slips: Slips, draw: Draw) -> tuple[list[str], str]:
        """The steps of a solution, one for each call of `slips`, and the answer they lead to."""
        ...

    def guess(self, draw: Draw) -> str:
        """An answer without work, often wrong."""
        ...


def below(count: int, draw: Draw) -> int:
    """A whole number in 0 .. count - 1, each equally likely."""
    return int(draw() * count)


def shuffled(items: list[T], draw: Draw) -> list[T]:
    """The items in a random order."""
    left, order = list(items), list[T]()
    while left:
        order.append(left.pop(below(len(left), draw)))
    return order


def another(value: int, low: int, high: int, draw: Draw) -> int:
    """A whole number in low .. high other than `value`, each equally likely."""
    inside = low <= value <= high
    other = low + below(high - low + 1 - inside, draw)
    return other + (inside and other >= value)
