"""The progress line: live on a terminal, plain elsewhere, silent in other processes."""

from __future__ import annotations

import io
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from r1jax.metrics.heartbeat import HEARTBEAT, span
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


def test_the_bar_says_what_is_compiled_while_it_is() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress("zero (stage 2 of 4)", 20, console=console) as progress:
        assert "starting" in out.getvalue() and "zero (stage 2 of 4)" in out.getvalue()
        seen = []
        refresh = progress._bar.update  # type: ignore[union-attr]
        progress._bar.update = lambda *a, **k: (seen.append(k["figures"]), refresh(*a, **k))  # type: ignore

        def fresh_program(x: jax.Array) -> jax.Array:
            return jnp.sin(x) + 0.125

        jax.jit(fresh_program)(jnp.ones(3))
    # What was shown before comes back.
    begun = seen.index("compiling fresh_program")
    assert seen[begun + 1] == "starting"


def test_a_long_compilation_is_a_plain_line_elsewhere() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=120)
    with Progress("zero", 20, console=console, every_seconds=0.05) as progress:
        progress._begin_compiling("update")
        time.sleep(0.3)
        progress._end_compiling("update", 0.3)
        progress._begin_compiling("short")
        progress._end_compiling("short", 0.0)
        time.sleep(0.2)
        progress._begin_compiling("left")
    time.sleep(0.2)
    assert out.getvalue() == "zero: compiling update\n"


def test_times_of_the_devices_and_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=120)
    monkeypatch.setattr(HEARTBEAT, "device_seconds", 5.0)
    with Progress("zero", 4, console=console, every_seconds=0.0, clock=clock) as progress:
        # Of 20 seconds, 12 were spent in an update, 4 of them on compiling it, and 2 on others.
        HEARTBEAT.device_seconds += 12.0
        with span("update"):
            progress._end_compiling("update", 4.0)
        progress._end_compiling("schedule", 2.0)
        clock.now += 20
        progress.update(2, {"reward": 0.5})
        clock.now += 2
        progress.update(3, {"reward": 0.5})
    lines = out.getvalue().splitlines()
    assert lines[0] == "zero 2/4  reward 0.5  device 4 s  host 3 s"
    assert "device" not in lines[1]  # nothing was waited for
    assert lines[1].endswith("  0:02 left")  # the steps that compiled are no measure


def test_the_time_that_is_left_is_measured_without_what_comes_once() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=120)
    with Progress("zero", 100, console=console, every_seconds=0.0, clock=clock) as progress:
        for step, seconds, compiled in (
            (1, 60.0, 55.0),  # compiles
            (2, 5.0, 0.1),  # hardly
            (3, 40.0, 35.0),  # another program
            (5, 10.0, 0.0),
            (5, 3.0, 0.0),  # no step is done
            (6, 4.0, 0.0),
        ):
            clock.now += seconds
            progress._end_compiling("update", compiled)
            progress.update(step, {})
    left = [line.split("  ")[1:] for line in out.getvalue().splitlines()]
    seconds_left = [[], ["8:10 left"], ["8:05 left"], ["7:55 left"], ["7:55 left"], ["8:37 left"]]
    assert left == seconds_left

    # Of the first interval, in which weights and data came, only where nothing else is known.
    out.truncate(0)
    with Progress("all", 9, console=console, every_seconds=0.0, clock=clock) as progress:
        for step, seconds in ((1, 30.0), (2, 2.0), (3, 4.0)):
            clock.now += seconds
            progress.update(step, {})
    assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == [
        "4:00 left",
        "0:14 left",
        "0:18 left",
    ]


def test_nested_waiting_counts_once() -> None:
    before = HEARTBEAT.device_seconds
    with span("held_out"):
        time.sleep(0.05)
        with span("rollout"), span("reward model"):
            time.sleep(0.05)
    assert 0.05 <= HEARTBEAT.device_seconds - before < 0.1
