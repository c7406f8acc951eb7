"""The progress line: live on a terminal, plain elsewhere, silent in other processes."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from r1jax.metrics.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(*, terminal: bool, **options: Any) -> list[str]:
    """Ten steps of 4 seconds each from step 10 of 20; the written lines."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Progress("zero", 20, start=10, console=console, clock=clock, **options) as progress:
        progress.print("resumed at step 10 [b]not markup[/b]")
        for step in range(11, 21):
            clock.now += 4
            progress.update(
                step,
                {
                    "reward": step / 20,
                    "length": 123.4,
                    "tokens_per_second": 12_345.0,
                    "loss": None,
                },
            )
    return out.getvalue().splitlines()


def test_plain_lines_when_not_a_terminal() -> None:
    assert run(terminal=False, every_seconds=10) == [
        "resumed at step 10 [b]not markup[/b]",
        "zero 13/20  reward 0.65  length 123  12.3k tok/s  0:28 left",
        "zero 16/20  reward 0.8  length 123  12.3k tok/s  0:16 left",
        "zero 19/20  reward 0.95  length 123  12.3k tok/s  0:04 left",
        "zero 20/20  reward 1  length 123  12.3k tok/s",
    ]


def test_live_bar_on_a_terminal() -> None:
    text = "\n".join(run(terminal=True))
    assert "20/20" in text and "reward 1  length 123  12.3k tok/s" in text
    assert "\x1b[" in text
    assert "[b]not markup[/b]" in text


def test_silent_in_other_processes() -> None:
    assert run(terminal=False, process_index=1) == []
    assert run(terminal=True, process_index=1) == []


def test_figures_that_are_not_finite_and_long_times() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress("base", 2, console=Console(file=out, width=120), clock=clock) as progress:
        clock.now += 3725
        progress.update(1, {"loss": float("nan"), "tokens_per_second": float("inf")})
    assert out.getvalue() == "base 1/2  loss nan  inf tok/s  1:02:05 left\n"


def test_the_bar_says_that_the_first_step_is_compiled() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress("zero", 20, console=console):
        pass
    assert "compiling the first step" in out.getvalue()
