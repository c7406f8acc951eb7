"""STEM: way, speed and time, by choice: `v=4 t=3 s? 7F 12G 34H`."""

from __future__ import annotations

from dataclasses import dataclass

from r1jax.data.tasks.bilingual.subject import Draw, Slips, another, below, shuffled

_LETTERS = "FGH"
"""Names of the options. No word of either language has them, so that a thought may name one."""


@dataclass(frozen=True)
class Motion:
    """Two quantities are given; the third is the question.

    Attributes:
        speed, time: 2 .. 7; the way is their product.
        unknown: `s` (way), `v` (speed) or `t` (time).
        options: The values offered, the right one among them.
    """

    speed: int
    time: int
    unknown: str
    options: tuple[int, ...]

    @property
    def prompt(self) -> str:
        values = {"s": self.speed * self.time, "v": self.speed, "t": self.time}
        given = " ".join(
            f"{name}={value}" for name, value in values.items() if name != self.unknown
        )
        offered = " ".join(f"{x}{letter}" for letter, x in zip(_LETTERS, self.options, strict=True))
        return f"{given} {self.unknown}? {offered}"

    @property
    def value(self) -> int:
        """The right value."""
        return {"s": self.speed * self.time, "v": self.speed, "t": self.time}[self.unknown]

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
            value = next(x for x in shuffled(list(self.options), draw) if x != value)
        letter = _LETTERS[self.options.index(value)]
        return [f"{left}={value}{letter}"], letter

    def guess(self, draw: Draw) -> str:
        return _LETTERS[below(len(_LETTERS), draw)]


def draw_motion(draw: Draw) -> Motion:
    """Wrong options are near the right value, and differ."""
    speed, time = 2 + below(6, draw), 2 + below(6, draw)
    unknown = "svt"[below(3, draw)]
    value = {"s": speed * time, "v": speed, "t": time}[unknown]
    options = [value]
    while len(options) < len(_LETTERS):
        other = another(value, max(value - 6, 1), value + 6, draw)
        if other not in options:
            options.append(other)
    return Motion(speed, time, unknown, tuple(shuffled(options, draw)))
