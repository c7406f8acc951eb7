"""The other processes of a run: when one is lost, all stop, and each says which it was.

JAX notices a lost process only after 100 s, and does not name it; and a process that fails alone
would wait 300 s at JAX's exit for others. So every process writes a heartbeat to the key-value
store of `jax.distributed` (in process 0) every two seconds. Process 0 checks those of all others,
the others check its. Nothing here is a collective: it works while the devices hang.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import jax

from r1jax.processes import DistributedProcess, distributed_process

EXIT_PEER_LOST = 134
"""Exit status of a process that stops because the run lost another one.

128 + SIGABRT: how JAX ends a process for the same reason. The launcher starts the run again.
"""

INTERVAL = 2.0  # seconds between two heartbeats
TIMEOUT = 40.0  # seconds without one, after which a process is lost
JOIN_TIMEOUT = 300.0  # the same before the first one: hosts do not load Python equally fast
GRACE = 10.0  # seconds in which the others may fail alike, before a failure counts as one process's

_KEYS = "r1jax/peers/"
_AGAIN = "The same command on all hosts goes on from the last checkpoint"

# What a process has published. `host`: where it is; `heartbeat`: changes while it runs; `end`:
# `left`, or `failed` and the error; `gone`: it ends now, without waiting. Process 0: `verdict`.
Status = Mapping[str, str]


@contextmanager
def watched_peers() -> Iterator[None]:
    """Ends this process with `EXIT_PEER_LOST` and one line to say why, once another one is lost.

    A process whose body raises waits a moment for the others to fail alike: most errors are
    everybody's, and end in the usual way. Where the others go on without it, they end with
    `EXIT_PEER_LOST` and a line with its error, and it ends with status 1 without waiting for them.
    """
    me = distributed_process()
    if me is None:
        yield
        return
    watch = _Watch(me)
    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            watch.await_heartbeats()  # a collective fails at once where a process is gone
        watch.fail(error)
        raise
    watch.leave()


class _Heartbeats:
    """When each peer's heartbeat last changed. Times are seconds of one clock."""

    def __init__(self, peers: Iterable[int], now: float) -> None:
        self._statuses: dict[int, Status] = {peer: {} for peer in peers}
        self._since = dict.fromkeys(self._statuses, now)

    def update(self, statuses: Mapping[int, Status], now: float) -> None:
        """What the peers have published so far, as read just now."""
        for peer in self._statuses.keys() & statuses.keys():
            before, after = self._statuses[peer], statuses[peer]
            if any(before.get(key) != after.get(key) for key in ("heartbeat", "end")):
                self._since[peer] = now
            self._statuses[peer] = after

    def excuse(self, seconds: float) -> None:
        """Nothing could be read for this time, because of this process."""
        self._since = {peer: since + seconds for peer, since in self._since.items()}

    def verdict(self, now: float) -> str | None:
        """Why the run cannot go on, or None."""
        for peer, status in self._statuses.items():
            silent, end = now - self._since[peer], status.get("end", "")
            name = f"process {peer} ({status.get('host', 'which never came')})"
            if end.startswith("failed") and silent > GRACE:
                return f"{name} {end.replace(' ', ' with ', 1)}"
            if not end and silent > (TIMEOUT if "heartbeat" in status else JOIN_TIMEOUT):
                return f"{name} is lost: it has not been seen for {silent:.0f} s. {_AGAIN}"
        return None


class _Watch:
    """The threads that publish this process's heartbeat and check those of the others."""

    def __init__(self, me: DistributedProcess) -> None:
        self._store, self._index, self._count = me.store, me.index, me.count
        peers = range(1, me.count) if me.index == 0 else [0]
        self._heartbeats = _Heartbeats(peers, time.monotonic())
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._witness = None if me.index == 0 else _Witness(me)
        self._store.key_value_delete(f"{_KEYS}{me.index}")  # of a former run of this process
        self._publish("host", socket.gethostname())
        # Reading may hang where process 0 does, so another thread counts the seconds.
        self._threads = [
            threading.Thread(target=target, name=f"r1jax peers {target.__name__}", daemon=True)
            for target in (self._exchange, self._check)
        ]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """This process has finished; it is not lost."""
        self._stop_threads()
        self._publish("end", "left")

    def await_heartbeats(self) -> None:
        """Returns once all others have a new heartbeat; without one, the threads end it."""
        before = [each["heartbeat"] for each in self._read().values() if "heartbeat" in each]

        def renewed(status: Status) -> bool:
            return "end" in status or status.get("heartbeat") not in before

        self._wait_until(renewed, seconds=TIMEOUT + GRACE)

    def fail(self, error: BaseException) -> None:
        """Publishes it and waits for the others to end; if they do not, skips JAX's exit."""
        self._stop_threads()
        self._publish("end", " ".join(f"failed {type(error).__name__}: {error}".split())[:500])
        statuses = self._wait_until(
            lambda status: "end" in status or "gone" in status, seconds=GRACE + 4 * INTERVAL
        )
        if any("end" not in statuses.get(peer, {}) for peer in range(self._count)):
            atexit.register(self._exit_at_once)  # comes before JAX's, which is older

    def _exchange(self) -> None:
        beats = 0
        while not self._over.is_set():
            beats += 1
            with suppress(jax.errors.JaxRuntimeError):  # the store goes with process 0
                self._publish("heartbeat", f"{self._index}:{beats}")
                statuses = self._read(None if self._index == 0 else 0)
                self._heartbeats.update(statuses, time.monotonic())
                if self._index > 0 and "verdict" in statuses.get(0, {}):
                    self._end(statuses[0]["verdict"])
            self._over.wait(INTERVAL)

    def _check(self) -> None:
        before = time.monotonic()
        while not self._over.wait(INTERVAL / 2):
            now = time.monotonic()
            if now - before > 2 * INTERVAL:  # this process was stopped, and read nothing
                self._heartbeats.excuse(now - before)
            before = now
            verdict = self._heartbeats.verdict(now)
            if verdict is not None:
                self._end(verdict)

    def _end(self, verdict: str) -> None:
        self._ending.acquire()  # never released: it is printed once
        print(f"\n{_sentence(verdict, self._index)}", file=sys.stderr, flush=True)
        self._exit(EXIT_PEER_LOST, verdict=verdict)

    def _exit_at_once(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._exit(1)

    def _exit(self, exit_status: int, **published: str) -> None:
        """Without JAX, whose exit waits for all processes."""

        def publish() -> None:
            with suppress(jax.errors.JaxRuntimeError):
                for key, value in {**published, "gone": "now"}.items():
                    self._publish(key, value)

        try:
            thread = threading.Thread(target=publish, daemon=True)  # it hangs where process 0 does
            thread.start()
            thread.join(INTERVAL)
            if self._index == 0:  # when 0 exits, JAX ends the others, with messages of its own
                self._wait_until(
                    lambda status: "gone" in status or status.get("end") == "left",
                    seconds=3 * INTERVAL,
                )
            if self._witness is not None:
                self._witness.dismiss()
        finally:
            os._exit(exit_status)

    def _wait_until(self, done: Callable[[Status], bool], seconds: float) -> dict[int, Status]:
        """What the processes published, once all others are done; at the latest in `seconds`."""
        until = time.monotonic() + seconds
        while True:
            statuses = self._read()
            others = [statuses.get(peer, {}) for peer in range(self._count) if peer != self._index]
            if all(map(done, others)) or time.monotonic() > until:
                return statuses
            time.sleep(INTERVAL / 4)

    def _stop_threads(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(INTERVAL)
        if self._witness is not None:
            self._witness.dismiss()

    def _publish(self, key: str, value: str) -> None:
        self._store.key_value_set(f"{_KEYS}{self._index}/{key}", value, allow_overwrite=True)

    def _read(self, peer: int | None = None) -> dict[int, Status]:
        """What all processes published, or one."""
        statuses: dict[int, dict[str, str]] = {}
        folder = _KEYS if peer is None else f"{_KEYS}{peer}/"
        for path, value in self._store.key_value_dir_get(folder):
            number, key = path.removeprefix(_KEYS).split("/")
            statuses.setdefault(int(number), {})[key] = value
        return {**statuses}


class _Witness:
    """Prints that process 0 is lost where this process cannot: JAX ends it in the same moment.

    A child process, which waits until this process is gone. If process 0 is, too, it prints that.
    """

    _PROGRAM = """
import socket, sys
line, host, port = sys.argv[1:]
if not sys.stdin.read():
    try:
        socket.create_connection((host, int(port)), timeout=5)
    except OSError:
        print(line, file=sys.stderr)
"""

    def __init__(self, me: DistributedProcess) -> None:
        host, _, port = me.address.rpartition(":")
        line = _sentence(
            f"process 0 ({me.address}) is lost: nobody answers there. {_AGAIN}", me.index
        )
        self._child = subprocess.Popen(
            [sys.executable, "-ISc", self._PROGRAM, line, host.strip("[]"), port],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def dismiss(self) -> None:
        """This process ends without the witness."""
        with suppress(OSError, ValueError):  # it is gone already, or dismissed
            self._child.communicate(b"dismissed", timeout=INTERVAL)


def _sentence(verdict: str, index: int) -> str:
    return (
        f"{verdict[0].upper()}{verdict[1:]}. Process {index} ({socket.gethostname()}) stops, with "
        f"exit status {EXIT_PEER_LOST}."
    )
