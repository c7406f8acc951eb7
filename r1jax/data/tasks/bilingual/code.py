"""Code: a program that applies operations to `x`, which the question names from the last to the
first: `*2 of -1 of +3 of x:` asks for three statements and a `print`. The tests stay hidden."""

from __future__ import annotations

import json
from dataclasses import dataclass

from r1jax.data.tasks.bilingual.subject import Draw, Slips, below, shuffled

_INPUTS = (0, 7)
"""Two inputs tell different programs apart: all operations are linear, so equal results on both
mean equal functions."""


@dataclass(frozen=True)
class Program:
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
        steps = []
        for operation in self.operations:
            steps.append(_other(operation, draw) if slips("statement") else operation)
        return steps, _source(steps)

    def guess(self, draw: Draw) -> str:
        operations = list(self.operations)
        kind = draw()
        if kind < 0.4:
            operations.reverse()  # as they stand in the question
        elif kind < 0.6:
            operations = shuffled(operations, draw)
        else:
            at = below(len(operations), draw)
            operations[at] = _other(operations[at], draw)
        return _source(operations)


def draw_program(draw: Draw) -> Program:
    """Two or three operations; a factor is 2 or 3."""
    return Program(tuple(_operation(draw) for _ in range(2 + below(2, draw))))


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
