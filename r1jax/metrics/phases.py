"""What the process is doing now: a name for the profiler's timeline and for the watchdog."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax


@dataclass
class Activity:
    """How far this process has come. A run is its process's only business, so there is one record.

    Attributes:
      stage: the stage that runs; empty before the first one.
      step: what is done of it: optimizer steps, or prompts.
      phases: that are open, the outermost first.
      last: the phase that was left last.
      signs: how many signs of life there were.
      since: of the last sign of life, in seconds of `time.monotonic`.
    """

    stage: str = ""
    step: int = 0
    phases: list[str] = field(default_factory=list)
    last: str = ""
    signs: int = 0
    since: float = field(default_factory=time.monotonic)

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self.stage, self.step, self.last = stage, 0, ""
        self.advance()

    def reach(self, step: int) -> None:
        """So much of the stage is done."""
        self.step = step
        self.advance()

    def advance(self) -> None:
        """A sign of life."""
        self.signs += 1
        self.since = time.monotonic()

    def __str__(self) -> str:
        """Such as `stage zero, step 12, in held_out > rollout`."""
        if not self.stage:
            place = "before the first stage"
        else:
            place = f"stage {self.stage}, step {self.step}"
        if self.phases:
            return f"{place}, in {' > '.join(self.phases)}"
        return f"{place}, after {self.last}" if self.last else place


ACTIVITY = Activity()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what is done inside: a block (`with phase("update"):`) or a function (`@phase(...)`).

    A profile shows it as a span of the host's timeline; both of its ends are signs of life. Only
    for the thread that runs the stages.
    """
    ACTIVITY.phases.append(name)
    ACTIVITY.advance()
    try:
        with jax.profiler.TraceAnnotation(name):
            yield
    finally:
        ACTIVITY.last = ACTIVITY.phases.pop()
        ACTIVITY.advance()
