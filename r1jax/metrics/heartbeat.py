"""The heartbeat of this process: what it is doing now, for the watchdog and the profiler."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import jax

_DEVICE = ("rollout", "update", "reward model")
"""Spans in which this process waits for its devices."""


@dataclass
class _Heartbeat:
    """The progress of this process. A process runs one run, so there is one: `HEARTBEAT`.

    stage: that runs; empty before the first one. step: finished work of it: optimizer steps, or
    prompts. spans: names of the open spans, the outermost first; last_span: closed last. beats:
    so far; last_beat: its time, in seconds of `time.monotonic`. device_seconds: in spans that wait
    for the devices, compilations included.
    """

    stage: str = ""
    step: int = 0
    spans: list[str] = field(default_factory=list)
    last_span: str = ""
    beats: int = 0
    last_beat: float = field(default_factory=time.monotonic)
    device_seconds: float = 0.0

    def begin_stage(self, stage: str) -> None:
        """A stage begins."""
        self.stage, self.step, self.last_span = stage, 0, ""
        self.beat()

    def set_step(self, step: int) -> None:
        """Work of the stage up to `step` is finished."""
        self.step = step
        self.beat()

    def beat(self) -> None:
        """Shows that the process makes progress."""
        self.beats += 1
        self.last_beat = time.monotonic()

    @property
    def waits_for_devices(self) -> bool:
        """Whether the open spans are such that wait for the devices."""
        return any(name in _DEVICE for name in self.spans)

    def __str__(self) -> str:
        """Such as `stage zero, step 12, in held_out > rollout`."""
        if not self.stage:
            position = "before the first stage"
        else:
            position = f"stage {self.stage}, step {self.step}"
        if self.spans:
            return f"{position}, in {' > '.join(self.spans)}"
        return f"{position}, after {self.last_span}" if self.last_span else position


HEARTBEAT = _Heartbeat()


@contextmanager
def span(name: str) -> Iterator[None]:
    """Names the work inside: a block (`with span("update"):`) or a function (`@span("update")`).

    A profile shows it on the host's timeline; its start and its end are beats. Only for the thread
    that runs the stages.
    """
    HEARTBEAT.spans.append(name)
    HEARTBEAT.beat()
    began = time.monotonic()
    try:
        with jax.profiler.TraceAnnotation(name):
            yield
    finally:
        HEARTBEAT.last_span = HEARTBEAT.spans.pop()
        HEARTBEAT.beat()
        if name in _DEVICE and not HEARTBEAT.waits_for_devices:
            HEARTBEAT.device_seconds += HEARTBEAT.last_beat - began
