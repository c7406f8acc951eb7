"""`python ...` without its imports: a process is forked from one that has imported everything.

A test of processes starts many, and imports take three seconds of a processor in each. Here they
begin as new ones do, with arguments, environment, directory, outputs and exit status of their own.
Only the seed of `hash` is the same in all: a test of what must not depend on that starts one by
itself.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import undrawn
import yaml

_PATHS = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]


class Process:
    """A running process, with what tests use of `subprocess.Popen`."""

    def __init__(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        one_output: bool = False,
        start_new_session: bool = False,
    ) -> None:
        """Begins `python ARGUMENTS`, which are `SCRIPT ...`, `-m MODULE ...` or `-c PROGRAM ...`.

        one_output: errors are in the text of what it printed.
        """
        self.args, self.returncode = arguments, None
        folder = _server()
        self._outputs = [tempfile.NamedTemporaryFile(dir=folder) for _ in range(2)]
        names = [each.name for each in self._outputs]
        request = {
            "arguments": arguments,
            "environment": dict(os.environ if env is None else env),
            "directory": str(cwd or Path.cwd()),
            "outputs": names[:1] * 2 if one_output else names,
            "session": start_new_session,
        }
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(folder / "server"))
        self._server.sendall(json.dumps(request).encode() + b"\n")
        self.pid = self._number()

    def _number(self) -> int:
        """What the server says next."""
        said = b""
        while not said.endswith(b"\n"):
            said += (byte := self._server.recv(1))
            assert byte, "the server has ended"
        return int(said)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._number()
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, errors = (Path(each.name).read_text(errors="replace") for each in self._outputs)
        return out, errors


def run(*arguments: str, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """The end of a process, as of `subprocess.run`; options: those of `Process`."""
    process = Process(*arguments, **options)
    try:
        out, errors = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, process.wait(), out, errors)


@cache
def _server() -> Path:
    """The folder of a server, which ends with this process: then the pipe is at its end."""
    folder = Path(tempfile.mkdtemp(prefix="r1jax-tests-"))
    end, _held = os.pipe()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(_PATHS)}
    command = [sys.executable, __file__, str(folder)]
    # It forks itself, so that it is nobody's child: tests look at what their own ones leave.
    subprocess.run(command, check=True, stdin=end, stdout=subprocess.DEVNULL, env=environment)
    os.close(end)
    return folder


def import_everything() -> None:
    """All of r1jax, and what it imports as it runs."""
    import r1jax

    names = [module.name for module in pkgutil.walk_packages(r1jax.__path__, "r1jax.")]
    names += ["transformers.tokenization_utils_tokenizers", "transformers.integrations.mistral"]
    names += [
        "transformers.convert_slow_tokenizer",
        "rich._emoji_codes",
        "jaxlib.mlir.dialects.mhlo",
    ]
    scripts = ("worker", "supervisor", "__main__")
    for name in names:
        if not name.endswith(scripts) and "tfds" not in name:
            with suppress(ImportError):  # of an extra
                importlib.import_module(name)


def collect_rarely() -> None:
    """Tracing makes many objects and hardly a cycle: looking for some takes a 20th of a run."""
    gc.set_threshold(100_000, 50, 100)


def _serve(folder: Path) -> list[str] | None:
    """Forks a process for each request. Returns the arguments in such a process; None at the end.

    A request is a line of JSON. The answer is the process's id in a line and, as it has ended, its
    exit status in another.
    """
    running: dict[int, socket.socket] = {}
    ended, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(signalled)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "server"))
        listener.listen(64)
        if os.fork():
            os._exit(0)  # now it can be asked
        while True:
            ready, _, _ = select.select([listener, ended, 0], [], [])
            if 0 in ready:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(folder)
                return None
            if ended in ready:
                os.read(ended, 4096)
            for pid in list(running):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    with running.pop(pid) as client, suppress(OSError):
                        client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            if listener in ready:
                client = listener.accept()[0]
                request = json.loads(client.makefile().readline())
                pid = os.fork()
                if not pid:
                    for each in (client, *running.values()):
                        each.close()
                    _begin(request)
                    return list(request["arguments"])
                client.sendall(b"%d\n" % pid)
                running[pid] = client


def _begin(request: dict[str, Any]) -> None:
    """Makes this process one that has just been started so."""
    import jax

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    os.chdir(request["directory"])
    for number, name in enumerate([os.devnull, *request["outputs"]]):
        file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, value in os.environ.items():  # JAX has read them, as it was imported
        option = name.lower()
        if name.startswith("JAX_") and value != before.get(name) and option in jax.config.values:
            jax.config.update(option, yaml.safe_load(value))
    if undrawn.VARIABLE in os.environ:
        undrawn.draw_nothing()
    paths = os.environ.get("PYTHONPATH", "")
    sys.path[:1] = paths.split(os.pathsep) if paths else []


def _run(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does."""
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    gc.disable()  # nothing that an import makes is garbage
    import_everything()
    gc.freeze()
    gc.enable()
    collect_rarely()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no thread of JAX runs before it sees devices
        arguments = _serve(Path(sys.argv[1]))
    if arguments is not None:
        _run(arguments)


if __name__ == "__main__":
    main()
