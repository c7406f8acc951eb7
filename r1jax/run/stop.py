"""How a run ends early: by SIGTERM, or because it cannot go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from r1jax.processes import any_process


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what would help."""


class Preempted(Exception):
    """SIGTERM arrived; the state is saved."""


@dataclass
class StopSignal:
    """Whether this process received SIGTERM; loops look at it where they can save and leave."""

    requested: bool = False

    def in_any_process(self) -> bool:
        """Whether any process received it; all processes must make the call together."""
        return any_process(self.requested)


@contextmanager
def stop_on_sigterm() -> Iterator[StopSignal]:
    """Gives the signal that SIGTERM sets while the block runs."""
    stop = StopSignal()

    def request(*_: object) -> None:
        stop.requested = True

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
