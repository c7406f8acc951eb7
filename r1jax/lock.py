"""One process group at a time writes to a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"  # the file's name
_TRIES = 10  # a report holds it for a moment, and so does a process that ends just now


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock of a local run directory, which is made, while the block runs.

    Process 0 of a run holds it for all hosts. It ends with that process, however that ends.

    Raises:
      ValueError: another process holds it; the message names it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    with open(path, "a+") as file:
        for _ in range(_TRIES):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            raise _refusal(directory)
        file.truncate(0)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def is_locked(directory: Path) -> bool:
    """Whether a process of any host that sees the directory holds its lock."""
    try:
        with open(directory / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def refuse_locked(directory: Path) -> None:
    """Raises ValueError, as `locked`, where a process holds the lock; keeps none, makes nothing."""
    for _ in range(_TRIES):
        if not is_locked(directory):
            return
        time.sleep(0.1)
    raise _refusal(directory)


def _refusal(directory: Path) -> ValueError:
    return ValueError(
        f"{directory}: {_holder(directory / LOCK)} is running it; wait for its end or stop it, or "
        "give this run another name, seed or output"
    )


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}, since {holder['since']},"
    except (ValueError, KeyError, TypeError):  # it writes just now
        return "another process"
