"""The first process of a sandbox (`r1jax.rewards.sandbox`): confines a command and outlives it.

    python -I -S -c THIS SETTINGS COMMAND ...

In a pid namespace it is process 1, whose end is the end of all others, and which nobody in it can
kill. Elsewhere it adopts every orphan that the command leaves (a daemon has forked twice and lost
its parent) and kills them all: when the command ends, on SIGTERM, and when the worker dies.

Only the standard library, and the least of it, since this starts once per test: modules such as
json and signal take longer to import than the rest takes. Hence `marshal` and the C library.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict

    class Settings(TypedDict):
        """What the command may do.

        Attributes:
          mark: written to standard error right before the command starts.
          folder: working directory.
          user: user and group id to change to; None: stay who it is.
          limits: (number of the resource, soft limit, hard limit).
          seccomp: the filter, an array of `struct sock_filter`.
          memory_folders: folders in which an empty memory file system is mounted.
          memory_options: of these file systems.
          readable, writable: with Landlock, the only files and folders; None: no Landlock.
          parent: the worker, with which all ends; 0: of another pid namespace, which sees to it.
        """

        mark: str
        folder: str
        user: int | None
        limits: list[tuple[int, int, int]]
        seccomp: bytes
        memory_folders: list[str]
        memory_options: str
        readable: list[str] | None
        writable: list[str]
        parent: int


_SIGINT, _SIGKILL, _SIGPIPE, _SIGTERM, _SIGXFSZ = 2, 9, 13, 15, 25
# linux/prctl.h
_SET_PARENT_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _DROP_CAPABILITY = 1, 4, 22, 24
_SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVILEGES = 36, 38
_FILTER_MODE = 2  # SECCOMP_MODE_FILTER
_NEW_MOUNTS, _NO_SUID_NO_DEVICES = 0x20000, 2 | 4  # CLONE_NEWNS; MS_NOSUID, MS_NODEV
_CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
# linux/landlock.h; the numbers of its calls are the same on all machines.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ, _FILE = 0b1101, 0b1100000000000111  # execute, read, list; what rights files can have
_FILE_RIGHTS = (0, 13, 14, 15, 15, 16, 16)  # how many rights each version of Landlock knows
_SCOPES = 0b11  # no abstract sockets and no signals to processes outside

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> int:
    """Calls a function of the C library; raises OSError if it fails."""
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def set_undumpable() -> None:
    """From here on, only root reads this process's memory and opens its files through /proc."""
    if sys.platform == "linux":
        _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)


def _parents() -> dict[int, int]:
    """Process id -> parent's, of all processes that are there now."""
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # pid (name) state parent ...; the name may hold spaces and brackets.
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):  # it ended just now
            pass
    return parents


def children(pid: int) -> list[int]:
    """Process ids of the direct children of `pid`, as the kernel lists them now."""
    return [child for child, parent in _parents().items() if parent == pid]


def _kill_descendants() -> None:
    """Kills until there are none; what they leave becomes ours, and is killed next."""
    while True:
        parents, found = _parents(), [os.getpid()]
        for pid in found:  # it grows
            found += [child for child, parent in parents.items() if parent == pid]
        for pid in found[1:]:
            try:
                os.kill(pid, _SIGKILL)
            except OSError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)
        except ChildProcessError:
            return


def _mount_memory(folders: list[str], options: str) -> None:
    if folders:
        _call("unshare", _NEW_MOUNTS)
    for folder in folders:
        where, kind = os.fsencode(folder), b"tmpfs"
        _call("mount", kind, where, kind, _NO_SUID_NO_DEVICES, options.encode())


def landlock_version() -> int:
    """What the kernel knows of Landlock; below 1 without it, from 6 on with signals."""
    version: int = _libc.syscall(_CREATE_RULESET, None, 0, 1)
    return version


def _landlock_rules(readable: list[str], writable: list[str]) -> int | None:
    """A set of rules that allows these files and folders only; None: the kernel has no Landlock."""
    version = landlock_version()
    if version < 1:
        return None
    rights = (1 << _FILE_RIGHTS[min(version, len(_FILE_RIGHTS) - 1)]) - 1
    handled = (ctypes.c_uint64 * 3)(rights, 0, _SCOPES)
    size = 24 if version >= 6 else 8
    rules = _call("syscall", _CREATE_RULESET, handled, size, 0)
    for path, allowed in [*((p, _READ) for p in readable), *((p, rights) for p in writable)]:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not os.path.isdir(path):
            allowed &= _FILE & rights
        rule = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        _call("syscall", _ADD_RULE, rules, 1, rule, 0)
        os.close(opened)
    return rules


def _confine(settings: Settings) -> None:
    """The rest of this process, and what it executes, has the command's rights only."""
    os.setsid()
    rules = None
    if settings["readable"] is not None:  # while it may still open them
        rules = _landlock_rules(settings["readable"], settings["writable"])
    for capability in range(64):  # fails behind the last one, and without the right to it
        _libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
    user = settings["user"]
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    version, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    _call("capset", version, none)
    _call("prctl", _SET_PARENT_DEATH_SIGNAL, _SIGKILL, 0, 0, 0)
    _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if rules is not None:
        _call("syscall", _RESTRICT_SELF, rules, 0)
        os.close(rules)
    os.chdir(settings["folder"])
    for number in (_SIGINT, _SIGPIPE, _SIGXFSZ):  # this Python catches or ignores them
        _libc.signal(number, None)
    code = ctypes.create_string_buffer(settings["seccomp"], len(settings["seccomp"]))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    program = Program(len(code) // 8, ctypes.addressof(code))
    for resource_number, soft, hard in settings["limits"]:
        resource.setrlimit(resource_number, (soft, hard))
    _call("prctl", _SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0)


def _start(settings: Settings, command: list[str]) -> int:
    """Starts the command; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        _confine(settings)
        os.write(2, settings["mark"].encode())
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
    except BaseException as error:
        os.write(2, f"supervisor: {error}\n".encode())
    finally:
        os._exit(127)


def supervise(settings: Settings, command: list[str]) -> int:
    """Runs `command` in a session of its own; returns its exit status, or 128 + its signal."""
    _mount_memory(settings["memory_folders"], settings["memory_options"])
    set_undumpable()
    child = 0
    if settings["parent"]:
        import signal

        def stop(*_: object) -> None:
            if child:  # its group at once: those who fork may be faster than the rest
                _libc.killpg(child, _SIGKILL)
            _kill_descendants()
            os._exit(128 + _SIGTERM)

        signal.signal(signal.SIGTERM, stop)
        _call("prctl", _SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _call("prctl", _SET_PARENT_DEATH_SIGNAL, _SIGTERM, 0, 0, 0)
        if os.getppid() != settings["parent"]:  # it died before the call
            return 128 + _SIGTERM
    _libc.signal(_SIGINT, None)  # of process 1, the kernel then lets no process inside send it
    child = _start(settings, command)
    while True:  # orphans come to this process, too
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            break
    if settings["parent"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _libc.killpg(child, _SIGKILL)
        _kill_descendants()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(supervise(marshal.loads(bytes.fromhex(sys.argv[1])), sys.argv[2:]))
