"""The subjects with right answers: problems, their worked solutions, and guesses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeVar

T = TypeVar("T")

Draw = Callable[[], float]
"""The next number of a stream, in [0, 1)."""

Slips = Callable[[str], bool]
"""Begins a step of the kind that it is given, in a language that the caller chooses; answers
whether it goes wrong, which depends on both."""


class Problem(Protocol):
    """One problem of a subject: the question, and the reference answer of its reward."""

    @property
    def prompt(self) -> str: ...

    @property
    def reference(self) -> str: ...

    def worked(self, slips: Slips, draw: Draw) -> tuple[list[str], str]:
        """The steps of a solution, one for each call of `slips`, and the answer they lead to."""
        ...

    def guess(self, draw: Draw) -> str:
        """An answer without work, often wrong."""
        ...


def below(count: int, draw: Draw) -> int:
    """A whole number in 0 .. count - 1, each equally likely."""
    return int(draw() * count)


def _shuffled(items: list[T], draw: Draw) -> list[T]:
    """The items in a random order."""
    left, order = list(items), list[T]()
    while left:
        order.append(left.pop(below(len(left), draw)))
    return order


def _another(value: int, low: int, high: int, draw: Draw) -> int:
    """A whole number in low .. high other than `value`, each equally likely."""
    inside = low <= value <= high
    other = low + below(high - low + 1 - inside, draw)
    return other + (inside and other >= value)


# Maths: add and subtract from left to right, `7+5-3=`, as in the task `running_total`.

_LARGEST = 9  # term
_CEILING = 19  # total


@dataclass(frozen=True)
class _Sum:
    """Signed terms, the first positive; every running total is in 0 .. 19.

    Few sums, because the model shall know each of them well enough to choose between languages.
    """

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"{self.terms[0]}" + "".join(f"{term:+d}" for term in self.terms[1:]) + "="

    @property
    def reference(self) -> str:
        return str(sum(self.terms))

    def worked(self, slips: Slips, draw: Draw) -> tuple[list[str], str]:
        total, steps = self.terms[0], []
        for term in self.terms[1:]:
            before = total
            # After a slip a total may leave the range; the text has no such numbers, so it is cut.
            total = min(max(total + term, 0), _CEILING)
            if slips("sum" if term > 0 else "difference"):
                total += 1 if total < _CEILING else -1
            steps.append(f"{before}{term:+d}={total}")
        return steps, str(total)

    def guess(self, draw: Draw) -> str:
        right = sum(self.terms)
        return str(right if draw() < 0.1 else _near(right, 12, draw))


def _draw_sum(draw: Draw) -> _Sum:
    """Three or four terms of one digit."""
    count = 3 + below(2, draw)
    total = 1 + below(_LARGEST, draw)
    terms = [total]
    while len(terms) < count:
        term = 1 + below(_LARGEST, draw)
        up, down = total + term <= _CEILING, total >= term
        if down and (not up or draw() < 0.5):
            term = -term
        total += term
        terms.append(term)
    return _Sum(tuple(terms))


def _near(value: int, spread: int, draw: Draw) -> int:
    return _another(value, max(value - spread, 0), min(value + spread, _CEILING), draw)


# Code: a program that applies operations to `x`, which the question names from the last to the
# first: `*2 of -1 of +3 of x:` asks for three statements and a `print`. The tests stay hidden.

_INPUTS = (0, 7)
"""Two inputs tell different programs apart: all operations are linear, so equal results on both
mean equal functions."""


@dataclass(frozen=True)
class _Program:
    """Operations in the order in which they are applied, such as `+3`."""

    operations: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return " of ".join([*reversed(self.operations), "x"]) + ":"

    @property
    def reference(self) -> str:
        tests = [{"input": f"{x}\n", "output": f"{self.applied(x)}\n"} for x in _INPUTS]
        return json.dumps({"language": "python", "prelude": "x=int(input())\n", "tests": tests})

    def applied(self, x: int) -> int:
        """What the program prints for an input."""
        for operation in self.operations:
            sign, number = operation[0], int(operation[1:])
            x = {"+": x + number, "-": x - number, "*": x * number}[sign]
        return x

    def worked(self, slips: Slips, draw: Draw) -> tuple[list[str], str]:
        steps = [_other(each, draw) if slips("statement") else each for each in self.operations]
        return steps, _source(steps)

    def guess(self, draw: Draw) -> str:
        operations = list(self.operations)
        kind = draw()
        if kind < 0.4:
            operations.reverse()  # as they stand in the question
        elif kind < 0.6:
            operations = _shuffled(operations, draw)
        else:
            at = below(len(operations), draw)
            operations[at] = _other(operations[at], draw)
        return _source(operations)


def _draw_program(draw: Draw) -> _Program:
    """Two or three operations; a factor is 2 or 3."""
    return _Program(tuple(_operation(draw) for _ in range(2 + below(2, draw))))


def _operation(draw: Draw) -> str:
    sign = "+-*"[below(3, draw)]
    return f"{sign}{2 + below(2, draw) if sign == '*' else 1 + below(9, draw)}"


def _other(operation: str, draw: Draw) -> str:
    while (other := _operation(draw)) == operation:
        pass
    return other


def _source(operations: list[str]) -> str:
    lines = [f"x{operation[0]}={operation[1:]}" for operation in operations]
    return "\n".join(["```", *lines, "print(x)", "```"])


# STEM: way, speed and time, by choice: `v=4 t=3 s? 7F 12G 34H`.

_LETTERS = "FGH"
"""Names of the options. No word of either language has them, so that a thought may name one."""


@dataclass(frozen=True)
class _Motion:
    """Two quantities (speed and time 2 .. 7; the way is their product) are given; the third is the
    question.

    unknown: `s` (way), `v` (speed) or `t` (time). options: values, the right one among them.
    """

    speed: int
    time: int
    unknown: str
    options: tuple[int, ...]

    @property
    def prompt(self) -> str:
        values = _quantities(self.speed, self.time).items()
        given = " ".join(f"{name}={value}" for name, value in values if name != self.unknown)
        offered = " ".join(f"{x}{letter}" for letter, x in zip(_LETTERS, self.options, strict=True))
        return f"{given} {self.unknown}? {offered}"

    @property
    def value(self) -> int:
        """The right value."""
        return _quantities(self.speed, self.time)[self.unknown]

    @property
    def reference(self) -> str:
        return _LETTERS[self.options.index(self.value)]

    def worked(self, slips: Slips, draw: Draw) -> tuple[list[str], str]:
        if self.unknown == "s":
            law, left = "product", f"{self.speed}*{self.time}"
        else:
            law = "quotient"
            known = self.time if self.unknown == "v" else self.speed
            left = f"{self.speed * self.time}/{known}"
        value = self.value
        if slips(law):
            value = next(x for x in _shuffled(list(self.options), draw) if x != value)
        letter = _LETTERS[self.options.index(value)]
        return [f"{left}={value}{letter}"], letter

    def guess(self, draw: Draw) -> str:
        return _LETTERS[below(len(_LETTERS), draw)]


def _quantities(speed: int, time: int) -> dict[str, int]:
    return {"s": speed * time, "v": speed, "t": time}


def _draw_motion(draw: Draw) -> _Motion:
    """Wrong options are near the right value, and differ."""
    speed, time = 2 + below(6, draw), 2 + below(6, draw)
    unknown = "svt"[below(3, draw)]
    value = _quantities(speed, time)[unknown]
    options = [value]
    while len(options) < len(_LETTERS):
        other = _another(value, max(value - 6, 1), value + 6, draw)
        if other not in options:
            options.append(other)
    return _Motion(speed, time, unknown, tuple(_shuffled(options, draw)))


# Logic: who comes before whom. `4>7 2>4 order?` has the answer `[2,4,7]`.


@dataclass(frozen=True)
class _Order:
    """Digits in their order, and the order of the facts about neighbours in the prompt."""

    digits: tuple[int, ...]
    fact_order: tuple[int, ...]

    @property
    def prompt(self) -> str:
        pairs = zip(self.digits, self.digits[1:], strict=False)
        facts = [f"{first}>{second}" for first, second in pairs]
        return " ".join(facts[i] for i in self.fact_order) + " order?"

    @property
    def reference(self) -> str:
        return _listed(self.digits)

    def worked(self, slips: Slips, draw: Draw) -> tuple[list[str], str]:
        order, steps = [self.digits[0]], []
        for digit in self.digits[1:]:
            if slips("fact"):
                digit = self.digits[below(len(self.digits), draw)]
            steps.append(f"{order[-1]}>{digit}")
            order.append(digit)
        return steps, _listed(order)

    def guess(self, draw: Draw) -> str:
        return _listed(_shuffled(list(self.digits), draw))


def _draw_order(draw: Draw) -> _Order:
    """Three or four different digits, their facts in any order."""
    count = 3 + below(2, draw)
    digits = _shuffled(list(range(10)), draw)[:count]
    return _Order(tuple(digits), tuple(_shuffled(list(range(count - 1)), draw)))


def _listed(digits: list[int] | tuple[int, ...]) -> str:
    return json.dumps(list(digits), separators=(",", ":"))


PROBLEMS: Mapping[str, Callable[[Draw], Problem]] = MappingProxyType(
    {"maths": _draw_sum, "code": _draw_program, "stem": _draw_motion, "logic": _draw_order}
)
"""Subject -> a function that draws one of its problems."""
