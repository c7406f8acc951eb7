"""Profiles on demand: some steps of a train loop, as a trace for XProf and TensorBoard."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import jax

OPTION = "--profile-steps"


@dataclass(frozen=True)
class ProfiledSteps:
    """The optimizer steps `first` to `last`, both included, counted from 1 as in metrics.jsonl.

    stage: of this train stage; None: of every train stage that has these steps.
    """

    first: int
    last: int
    stage: str | None = None

    @staticmethod
    def parse(text: str) -> ProfiledSteps:
        """Reads `[STAGE:]FIRST:LAST`; raises ValueError for something else."""
        match = re.fullmatch(r"(?:([a-z0-9][a-z0-9_\-]*):)?(\d+):(\d+)", text, re.ASCII)
        if match is None:
            raise ValueError(
                f"{OPTION} {text}: give FIRST:LAST, such as 10:12 for the steps 10, 11 and 12, or "
                "STAGE:FIRST:LAST"
            )
        steps = ProfiledSteps(int(match[2]), int(match[3]), match[1])
        if not 1 <= steps.first <= steps.last:
            raise ValueError(
                f"{OPTION} {text}: steps are counted from 1, and LAST is not before FIRST"
            )
        return steps

    def __str__(self) -> str:
        steps = f"{self.first}:{self.last}"
        return steps if self.stage is None else f"{self.stage}:{steps}"


class StepProfiler:
    """Traces some steps of one train loop (None: nothing) into a directory.

    A round of the loop takes data or samples, then makes one or more updates. The trace begins with
    the round of the first step, so that it holds the rollout which that step learns from, and ends
    after the last step.
    """

    def __init__(self, steps: ProfiledSteps | None, directory: Path) -> None:
        self.directory = directory
        self.wrote = False
        self._steps = steps
        self._tracing = False
        self._step: jax.profiler.StepTraceAnnotation | None = None
        self._end_of_round = 0

    def begin_round(self, done: int, updates: int) -> None:
        """A round begins after `done` steps, and makes `updates` more."""
        self._end_of_round = done + updates
        if self._steps is None or self.wrote:
            return
        due = done < self._steps.last and self._end_of_round >= self._steps.first
        if due and not self._tracing:
            options = jax.profiler.ProfileOptions()
            # A span for every call of a Python function would be most of the file, and of the time.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self.directory, profiler_options=options)
            self._tracing = True
        if self._tracing:
            self._open(done + 1)

    def end_step(self, step: int) -> None:
        """The update `step` is finished, on the devices too."""
        if not self._tracing or self._steps is None:
            return
        self._close_step()
        if step >= self._steps.last:
            self.close()
        elif step < self._end_of_round:
            self._open(step + 1)

    def close(self) -> None:
        """Writes the trace, if one is being made."""
        if self._tracing:
            self._close_step()
            self._tracing = False
            jax.profiler.stop_trace()
            self.wrote = True

    def _open(self, step: int) -> None:
        self._step = jax.profiler.StepTraceAnnotation("step", step_num=step)
        self._step.__enter__()

    def _close_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
