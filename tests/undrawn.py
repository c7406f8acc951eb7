"""Reports without their figures, for the many runs of which no test looks at one.

Drawing takes half a second of a processor in each run.
"""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# In the environment of processes that draw nothing either (see forked.py).
VARIABLE = "R1JAX_TESTS_DRAW_NOTHING"
FUNCTIONS = ("line_plot", "dot_plot", "band_plot")


def _title_alone(*_: Any, title: str, **__: Any) -> str:
    return f'<svg role="img" aria-label="{html.escape(title)}"></svg>'


def _users() -> Iterator[tuple[ModuleType, str]]:
    """The imported modules of the report that have a function of `FUNCTIONS`, and its name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("r1jax.report.") and name != "r1jax.report.plots":
            yield from ((module, function) for function in FUNCTIONS if hasattr(module, function))


def draw_nothing() -> None:
    for module, function in _users():
        setattr(module, function, _title_alone)


@contextmanager
def undrawn() -> Iterator[None]:
    """In the block neither this process nor those that it starts draw."""
    found = [(module, function, getattr(module, function)) for module, function in _users()]
    draw_nothing()
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        for module, function, draws in found:
            setattr(module, function, draws)
