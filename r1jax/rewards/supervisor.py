"""Runs one command and leaves none of its processes behind, for `r1jax.rewards.sandbox`.

    python -I -S supervisor.py PARENT COMMAND ...

Where there is no pid namespace to do it, this process adopts every orphan that the command leaves
(a daemon has forked twice and lost its parent) and kills them all: when the command ends, on
SIGTERM, and when PARENT dies. It is a script of its own, of the standard library only, because the
kernel hands orphans to a whole process, and the worker's and the trainer's children are their own.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid`, as the kernel lists them now."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # pid (name) state parent ...; the name may hold spaces and brackets.
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):  # it ended just now
            continue
        if parent == pid:
            found.append(int(name))
    return found


def _kill_descendants() -> None:
    """Kills children until there are none; what they leave becomes ours, and is killed next."""
    while True:
        for child in children(os.getpid()):
            try:
                os.kill(child, signal.SIGKILL)
            except OSError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def supervise(parent: int, command: list[str]) -> int:
    """Runs `command` in a session of its own; returns its exit status, or 128 + its signal."""
    import ctypes

    prctl: Callable[[int, int], int] = ctypes.CDLL(None, use_errno=True).prctl

    def stop(*_: object) -> None:
        _kill_descendants()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    if prctl(_SET_CHILD_SUBREAPER, 1) or prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM):
        sys.exit("supervisor: prctl failed")
    if os.getppid() != parent:  # it died before the call
        return 128 + signal.SIGTERM
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.execv(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error}\n".encode())
        os._exit(127)
    _, status = os.waitpid(child, 0)
    _kill_descendants()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(supervise(int(sys.argv[1]), sys.argv[2:]))
