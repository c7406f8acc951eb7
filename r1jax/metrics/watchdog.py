"""Reports a run that makes no progress, with the stacks of all its threads."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from r1jax.metrics.heartbeat import HEARTBEAT

EXIT_HUNG = 134
"""Exit status of a process that the watchdog ends: that of SIGABRT (128 + 6), with which JAX ends
a process that has lost another one. tpu_scripts/ start such a run again."""

_PATIENCE = 10.0  # seconds for writing a file

_ADVICE = """\
What it may be:
- the first compilation of a large model (the stack is in backend_compile): set watchdog.seconds
  higher, or keep programs with compilation_cache;
- another process that has ended, or has taken another branch: of all processes' files, the one
  whose stack is elsewhere holds up the others;
- a file system or a server that does not answer (the stack is in a read, a write or a socket)."""


class Watchdog:
    """Watches `HEARTBEAT` from a separate thread.

    After `seconds` without a beat, the stacks of all threads go to standard error and to a new file
    in `directory`; again after twice as long, and so on. That the process makes progress again is
    reported, too. With `abort` the process is ended with `EXIT_HUNG` after the first report, by
    `end`: the main thread cannot do it, as it hangs.
    """

    def __init__(
        self,
        seconds: float,
        directory: Path,
        *,
        abort: bool = False,
        process_index: int = 0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._seconds, self._directory, self._abort = seconds, directory, abort
        self._process_index, self._end = process_index, end
        # Of a reported hang: the number of beats until then, and the time of the last one.
        self._reported: tuple[int, float] | None = None
        self._due = seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        HEARTBEAT.beat()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._thread.join()

    def check(self, now: float) -> None:
        """Reports if a report is due at `now`, in seconds of `time.monotonic`."""
        beats, since = HEARTBEAT.beats, HEARTBEAT.last_beat
        if self._reported is not None and self._reported[0] != beats:
            hung = since - self._reported[1]
            self._print(f"progress again, after {_duration(hung)}: {HEARTBEAT}")
            self._reported, self._due = None, self._seconds
        if now - since >= self._due:
            self._reported = beats, since
            self._due *= 2
            self._report(now - since)
            if self._abort:
                self._print(f"ended with status {EXIT_HUNG}, as watchdog.abort says")
                sys.stderr.flush()
                self._end(EXIT_HUNG)

    def _watch(self) -> None:
        # Ten checks in the time: a hang is seen late by no more than a tenth.
        while not self._closed.wait(min(self._seconds / 10, 10.0)):
            self.check(time.monotonic())

    def _report(self, hung: float) -> None:
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - hung))
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        path = self._directory / f"process-{self._process_index}-{stamp}.txt"
        text = (
            f"no progress for {_duration(hung)}, since {began}: {HEARTBEAT} "
            f"(watchdog.seconds = {self._seconds:g})\n{_ADVICE}\n\n{_stacks()}"
        )
        self._print(f"{text}(also in {path})")

        def write() -> None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"process {self._process_index}: {text}", encoding="utf-8")
            except OSError as error:
                self._print(f"{path} cannot be written: {error}")

        # In a thread that may be left behind: the file system may be what hangs.
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_PATIENCE)

    def _print(self, text: str) -> None:
        print(f"[process {self._process_index}] watchdog: {text}", file=sys.stderr, flush=True)


def _stacks() -> str:
    """The stacks of all threads, without running Python in them: one may hold any lock."""
    with tempfile.TemporaryFile() as file:  # faulthandler writes to descriptors only
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode("utf-8", "replace")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.3g} s"
