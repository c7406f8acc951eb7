"""One line about the progress of a stage: step, reward, length, tokens/s, times."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress

from r1jax.metrics.compilations import watched_compilations
from r1jax.metrics.heartbeat import HEARTBEAT

_NEGLIGIBLE = 0.1  # share of an interval that was compiled, with which it still says how fast it is


class Progress:
    """Progress of one stage, on the terminal.

    On a terminal it is a live bar. Elsewhere (a log file, CI) it is one plain line every
    `every_seconds`, and one for the last step. In a process other than 0 it is silent. While XLA
    compiles, the bar says what; a plain line does where that takes longer than `every_seconds`.
    `stage`: its name, with which of the stages it is. `start`: steps already done, when resumed.
    `clock`: seconds, monotonic.

        with Progress("zero", total=200) as progress:
            progress.update(1, {"reward": 0.4, "length": 120.0, "tokens_per_second": 5300.0})
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        start: int = 0,
        process_index: int = 0,
        console: Console | None = None,
        every_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.start = stage, total, start
        self._silent = process_index != 0
        self._console = console or Console()
        self._every_seconds = every_seconds
        self._clock = clock
        self._shown = self._printed = clock()
        self._devices = HEARTBEAT.device_seconds
        self._compiled = self._compiled_waiting = 0.0  # seconds; those within the devices' spans
        self._left = _TimeLeft()
        self._step, self._text = start, "starting"
        self._timer: threading.Timer | None = None
        self._exit = ExitStack()
        self._bar: RichProgress | None = None
        if self._console.is_terminal and not self._silent:
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, figures="starting")

    def update(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Shows that `step` steps are done, with `figures` (host numbers) in their order.

        `length` is shown in tokens, `tokens_per_second` as tok/s, others as numbers with their
        names; None is left out. Then come the seconds of a step since the last call, without
        compilations: of waiting for the devices, and of the rest, the host's; and the time that
        is left, once steps were done without compiling.
        """
        if self._silent:
            return
        now = self._clock()
        self._left.add(step - self._step, now - self._shown, self._compiled)
        times, left = self._times(step, now), self._left.seconds(self.total - step)
        shown_left = "" if left is None else f"{_duration(left)} left"
        text = "  ".join(filter(None, (_figures(figures), times, shown_left)))
        self._text = text
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=text)
            return
        if step >= self.total or now - self._printed >= self._every_seconds:
            self._printed = now
            self._line(f"{self.stage} {step}/{self.total}  {text}".rstrip())

    def print(self, message: str) -> None:
        """Writes one line, above a live bar."""
        if not self._silent:
            self._line(message)

    def __enter__(self) -> Progress:
        self._exit.enter_context(watched_compilations(self._begin_compiling, self._end_compiling))
        self._exit.callback(self._stop_timer)
        if self._bar is not None:
            self._bar.start()
            self._exit.callback(self._bar.stop)
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def _times(self, step: int, now: float) -> str:
        """Seconds of a step on the devices and on the host; "" where no step was done."""
        steps, devices = step - self._step, HEARTBEAT.device_seconds
        waited = devices - self._devices - self._compiled_waiting
        host = max(now - self._shown - self._compiled - waited, 0.0)
        self._step, self._shown, self._devices = step, now, devices
        self._compiled = self._compiled_waiting = 0.0
        if steps <= 0 or waited <= 0:
            return ""
        return f"device {waited / steps:.2g} s  host {host / steps:.2g} s"

    def _begin_compiling(self, function: str) -> None:
        if self._silent:
            return
        self._stop_timer()
        if self._bar is not None:
            self._bar.update(self._task, figures=f"compiling {function}")
            return
        text = f"{self.stage}: compiling {function}"
        self._timer = threading.Timer(self._every_seconds, self._line, [text])
        self._timer.daemon = True
        self._timer.start()

    def _end_compiling(self, function: str, seconds: float) -> None:
        self._compiled += seconds
        self._compiled_waiting += seconds if HEARTBEAT.waits_for_devices else 0.0
        self._stop_timer()
        if self._bar is not None:
            self._bar.update(self._task, figures=self._text)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _line(self, text: str) -> None:
        # Literal text: a completion in a message must not be taken for rich's markup.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _TimeLeft:
    """By the steps whose programs were there already: the first ones compile for long."""

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0
        self._intervals = 0
        self._of_first = False  # only the first interval is known, in which data and weights came
        self._interval, self._compiled = 0.0, 0.0  # since the last step

    def add(self, steps: int, seconds: float, compiled: float) -> None:
        """An interval in which steps were done, and how long of it was compiled."""
        self._interval += seconds
        self._compiled += compiled
        if steps <= 0:
            return
        if self._compiled <= _NEGLIGIBLE * self._interval:
            if self._of_first:
                self._steps, self._seconds = 0, 0.0
            self._of_first = self._intervals == 0
            self._steps += steps
            self._seconds += self._interval
        self._intervals += 1
        self._interval = self._compiled = 0.0

    def seconds(self, steps: int) -> float | None:
        """For so many more steps; None where there are none, or nothing is known yet."""
        if steps <= 0 or not self._steps:
            return None
        return self._seconds / self._steps * steps


def _figures(figures: Mapping[str, float | None]) -> str:
    shown = []
    for name, value in figures.items():
        if value is None:
            continue
        value = float(value)
        if name == "tokens_per_second":
            shown.append(f"{_short(value)} tok/s")
        elif name == "length":
            shown.append(f"length {value:.0f}")
        else:
            shown.append(f"{name.replace('_', ' ')} {value:.3g}")
    return "  ".join(shown)


def _short(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{suffix}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
