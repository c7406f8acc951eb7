"""What the commands print on: tables, a model's text, and which of several processes prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def process_index() -> int | None:
    """Which of several processes this is, once they have joined; None: it is the only one."""
    if "r1jax.processes" not in sys.modules:  # a mistake that was found before JAX was needed
        return None
    from r1jax.processes import distributed_process

    process = distributed_process()
    return None if process is None else process.index


def make_console() -> Console:
    """For tables, and for what is being done."""
    from rich.console import Console

    # Not cut to 80 columns when read by another program.
    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False)


def write_model_text(text: str) -> None:
    """Model text, at once. A terminal gets no control characters from a model."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or c.isprintable())
    sys.stdout.write(text)
    sys.stdout.flush()
