"""Limits of what a chat template or a regular expression of a config may take of this process."""

from __future__ import annotations

import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from r1jax.settings.section import SettingError

PATTERN_SECONDS = 5.0
"""CPU time in which a regular expression of a config has to be found in one text, or not."""


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


def find_all(pattern: re.Pattern[str], text: str, key: str) -> list[re.Match[str]]:
    """The matches of a config's regular expression, which do not overlap, in their order.

    key: of the setting that has the pattern, in its section.

    Raises:
      SettingError: the search takes longer than PATTERN_SECONDS of CPU time.
    """
    try:
        with cpu_time_limit(PATTERN_SECONDS):
            return list(pattern.finditer(text))
    except TimeOverError:
        raise SettingError(
            key,
            f"takes longer than {PATTERN_SECONDS:g} s to find in a text of {len(text)} characters; "
            "a repetition inside a repetition, as (a+)+, may take time without end",
        ) from None
