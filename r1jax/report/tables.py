"""Tables of figures with intervals: for the page, and as Markdown."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from markupsafe import Markup

from r1jax.report.wording import Figure


@dataclass(frozen=True)
class Heading:
    """Of a row or a column: a label, and what the page says in small print below it."""

    label: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of figures.

    Attributes:
      folded: hidden until the reader opens it.
    """

    title: str
    lead: str
    columns: list[Heading]
    rows: list[tuple[Heading, list[Figure]]]
    folded: bool = False


@dataclass(frozen=True)
class Plot:
    """A finished plot, with the names of its colours where it has more than one."""

    title: str
    svg: Markup
    legend: list[str]


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
