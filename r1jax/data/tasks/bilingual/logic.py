"""Logic: who comes before whom. `4>7 2>4 order?` has the answer `[2,4,7]`."""

from __future__ import annotations

import json
from dataclasses import dataclass

from r1jax.data.tasks.bilingual.subject import Draw, Slips, below, shuffled


@dataclass(frozen=True)
class Order:
    """Digits in their order, and the order of the facts about neighbours in the prompt."""

    digits: tuple[int, ...]
    fact_order: tuple[int, ...]

    @property
    def prompt(self) -> str:
        facts = self._facts()
        return " ".join(facts[i] for i in self.fact_order) + " order?"

    @property
    def reference(self) -> str:
        return _listed(self.digits)

    def _facts(self) -> list[str]:
        pairs = zip(self.digits, self.digits[1:], strict=False)
        return [f"{first}>{second}" for first, second in pairs]

    def worked(self, slips: Slips, draw: Draw) -> tuple[list[str], str]:
        order, steps = [self.digits[0]], []
        for digit in self.digits[1:]:
            if slips("fact"):
                digit = self.digits[below(len(self.digits), draw)]
            steps.append(f"{order[-1]}>{digit}")
            order.append(digit)
        return steps, _listed(order)

    def guess(self, draw: Draw) -> str:
        return _listed(shuffled(list(self.digits), draw))


def draw_order(draw: Draw) -> Order:
    """Three or four different digits, their facts in any order."""
    count = 3 + below(2, draw)
    digits = shuffled(list(range(10)), draw)[:count]
    return Order(tuple(digits), tuple(shuffled(list(range(count - 1)), draw)))


def _listed(digits: list[int] | tuple[int, ...]) -> str:
    return json.dumps(list(digits), separators=(",", ":"))
