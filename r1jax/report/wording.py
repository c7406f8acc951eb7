"""How the report prints figures, tables, durations and long texts."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from markupsafe import Markup

from r1jax.evaluation.metrics import JsonEstimate, Summary

_SHOWN_CHARACTERS = 3000


class Figure(NamedTuple):
    """A figure and its interval, as text."""

    value: str
    interval: str = ""


class Heading(NamedTuple):
    """Of a row or a column: a label, and its small print."""

    label: str
    note: str = ""


class Table(NamedTuple):
    """Rows of figures; `folded`: hidden until the reader opens it."""

    title: str
    lead: str
    columns: list[Heading]
    rows: list[tuple[Heading, list[Figure]]]
    folded: bool = False


class Plot(NamedTuple):
    """A finished plot, with the names of its colours where it has more than one."""

    title: str
    svg: Markup
    legend: list[str]


UNKNOWN = Figure("–")


def figure(estimate: JsonEstimate | None, *, percent: bool = False, digits: int = 1) -> Figure:
    """A summary's figure as text; a dash where there is none."""

    def text(number: float) -> str:
        return f"{(100 if percent else 1) * number:.{digits}f}".replace("-", "−")

    value, low, high = ((estimate or {}).get(name) for name in ("value", "low", "high"))
    if value is None:
        return UNKNOWN
    interval = "interval unknown" if low is None or high is None else f"{text(low)} – {text(high)}"
    return Figure(text(value) + (" %" if percent else ""), interval)


def value_of(figures: Summary, name: str) -> float | None:
    """The value of a summary's figure, where there is one."""
    value = (figures.get(name) or {}).get("value")
    return None if value is None else float(value)


def plural(count: int | None, noun: str) -> str:
    """`1 problem`, `128 problems`; without a count only the noun."""
    return f"{noun}s" if count is None else f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as text: 41 s, 6 min 12 s, 3 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = math.floor(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shortened(text: str) -> str:
    """The beginning and the end of a long text; the end is where the answer is."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n\n[… {left_out:,} characters left out …]\n\n{text[-half:]}"


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines."""
    return [part for part in text.split("\n\n") if part.strip()]


def flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as rows of dotted name and text."""
    if not isinstance(value, Mapping):
        return [] if value is None else [(prefix or "value", str(value))]
    return [
        row
        for key, inner in value.items()
        for row in flat(inner, f"{prefix}.{key}" if prefix else str(key))
    ]


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown; intervals in brackets, small print after a comma."""

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |\n"

    def text(figure: Figure) -> str:
        return f"{figure.value} ({figure.interval})" if figure.interval else figure.value

    columns = [f"{each.label}, {each.note}" if each.note else each.label for each in table.columns]
    return (
        line(["", *map(plain, columns)])
        + line(["---", *["---:"] * len(columns)])
        + "".join(
            line([plain(row.label), *(plain(text(cell)) for cell in cells)])
            for row, cells in table.rows
        )
    )


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    escaped = re.sub(r"([\\`*|~\[\]])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())
