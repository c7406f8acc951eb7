"""How a run ends early: by SIGTERM or Ctrl-C, or because it cannot go on."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from r1jax.processes import any_process
from r1jax.sharding import Layout

EXIT_PREEMPTED = 143
"""Exit status after SIGTERM (128 + 15): the state is saved, the same command goes on."""
EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C (128 + 2), likewise; after the second one nothing more is saved."""


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what would help."""


class Preempted(Exception):
    """SIGTERM or Ctrl-C arrived; the state is saved."""


@dataclass
class StopSignal:
    """Whether this process was told to stop; loops look at it where they can save and leave.

    layout: of the run's devices, over which processes agree.
    """

    layout: Layout | None = None
    requested: bool = False
    interrupted: bool = False  # by Ctrl-C

    def in_any_process(self) -> bool:
        """Whether any process was told to; all processes must make the call together."""
        return any_process(self.requested, self.layout)


@contextmanager
def stop_on_signals(layout: Layout | None = None) -> Iterator[StopSignal]:
    """Gives what SIGTERM and Ctrl-C set while the block runs. A second Ctrl-C ends the process.

    Python calls handlers between two of its own instructions, and compiling takes minutes; so a
    thread reads the signals as they arrive.
    """
    stop = StopSignal(layout)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader, stop), name="r1jax stop", daemon=True)
    watcher.start()

    def request(number: int, _: object) -> None:
        stop.requested = True
        stop.interrupted |= number == signal.SIGINT

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request) for number in numbers}
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()  # which ends the thread
        watcher.join()
        reader.close()


def _watch(signals: socket.socket, stop: StopSignal) -> None:
    interrupts = 0
    while number := signals.recv(1):
        if number[0] != signal.SIGINT:
            continue
        interrupts += 1
        stop.requested = stop.interrupted = True
        if interrupts == 1:
            print(
                "\nCtrl-C: the run saves and stops at the end of this step; once more leaves at "
                "once, and the next start goes on from the checkpoint before",
                file=sys.stderr,
                flush=True,
            )
        else:
            if sys.stderr.isatty():  # the progress bar had hidden it
                print("\x1b[?25h", end="", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)
