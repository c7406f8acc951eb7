"""Maths: add and subtract from left to right, `7+5-3=`, as in the task `running_total`."""

from __future__ import annotations

from dataclasses import dataclass

from r1jax.data.tasks.bilingual.subject import Draw, Slips, another, below

_LARGEST = 9  # term
_CEILING = 19  # total


@dataclass(frozen=True)
class Sum:
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


def draw_sum(draw: Draw) -> Sum:
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
    return Sum(tuple(terms))


def _near(value: int, spread: int, draw: Draw) -> int:
    return another(value, max(value - spread, 0), min(value + spread, _CEILING), draw)
