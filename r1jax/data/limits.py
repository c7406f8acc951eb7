"""Limits of what a chat template or a regular expression of a config may take of this process."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class TimeOverError(BaseException):
    """The block took more CPU time. No Exception: jinja catches those where it folds constants."""


@contextmanager
def cpu_time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeOverError in the block when this thread has computed for longer.

    Python handles signals in its main thread only: in another one there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end = time.thread_time() + seconds

    def check(number: int, frame: FrameType | None) -> None:
        if time.thread_time() > end:  # not so where the process was stopped or the machine is busy
            raise TimeOverError

    handler = signal.signal(signal.SIGALRM, check)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """MemoryError in the block where the process comes to have `more` bytes more than now.

    On Linux and in the main thread alone, and only where no limit of its address space is lower.
    """
    # macOS does not keep RLIMIT_AS. Two threads would each restore what the other one has set.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (sys.platform.startswith("linux") and in_main_thread):
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize() + more
    if 0 <= before <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
