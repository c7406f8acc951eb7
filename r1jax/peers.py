"""The other processes of a run: when one is lost, all stop, and each says which it was.

JAX notices a lost process as well, but only after 100 s, and not in words that lead a user to it;
and a process that fails alone would wait 300 s at JAX's exit for others that wait for it. So every
process of a run leaves a sign of life in the key-value store of `jax.distributed` (which lives in
process 0) every two seconds. Process 0 looks for those of all others, the others for its. Nothing
here is a collective: it works while the devices hang.
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

BEAT = 2.0  # seconds between two signs of life
LIMIT = 40.0  # seconds without one, after which a process is lost
FIRST_LIMIT = 300.0  # the same before the first one: hosts do not load Python equally fast
GRACE = 10.0  # seconds in which the others may fail alike, before a failure counts as one process's

_KEYS = "r1jax/peers/"
_AGAIN = "The same command on all hosts goes on from the last checkpoint"

# What a process told. `host`: where it is; `seen`: changes while it lives; `end`: `left`, or
# `failed` and the error; `gone`: it ends now, without waiting. Process 0: perhaps the `verdict`.
Told = Mapping[str, str]


@contextmanager
def watched_peers() -> Iterator[None]:
    """Ends this process with `EXIT_PEER_LOST` and one line to say why, once another one is lost.

    A process whose body raises waits a moment for the others to fail alike: most errors are
    everybody's, and end in the usual way. Where the others go on without it, they end with
    `EXIT_PEER_LOST` and a line with its error, and it ends with status 1 without waiting for them.

    With one process it does nothing.
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
            watch.see_all()  # a collective fails at once where a process is gone
        watch.fail(error)
        raise
    watch.leave()


class Sightings:
    """When each peer was last seen to live. Times are seconds of one clock."""

    def __init__(self, peers: Iterable[int], now: float) -> None:
        self._told: dict[int, Told] = {peer: {} for peer in peers}
        self._since = dict.fromkeys(self._told, now)

    def note(self, told: Mapping[int, Told], now: float) -> None:
        """What the peers have told so far, as read just now."""
        for peer in self._told.keys() & told.keys():
            if any(self._told[peer].get(key) != told[peer].get(key) for key in ("seen", "end")):
                self._since[peer] = now
            self._told[peer] = told[peer]

    def excuse(self, seconds: float) -> None:
        """Nobody could be seen for so long, for a reason of our own."""
        self._since = {peer: since + seconds for peer, since in self._since.items()}

    def verdict(self, now: float) -> str | None:
        """Why the run cannot go on, or None."""
        for peer, told in self._told.items():
            silent, end = now - self._since[peer], told.get("end", "")
            who = f"process {peer} ({told.get('host', 'which never came')})"
            if end.startswith("failed") and silent > GRACE:
                return f"{who} {end.replace(' ', ' with ', 1)}"
            if not end and silent > (LIMIT if "seen" in told else FIRST_LIMIT):
                return f"{who} is lost: it has not been seen for {silent:.0f} s. {_AGAIN}"
        return None


class _Watch:
    """The threads that tell that this process lives, and look whether the others do."""

    def __init__(self, me: DistributedProcess) -> None:
        self._store, self._index, self._count = me.store, me.index, me.count
        peers = range(1, me.count) if me.index == 0 else [0]
        self._sightings = Sightings(peers, time.monotonic())
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._witness = None if me.index == 0 else _Witness(me)
        self._store.key_value_delete(f"{_KEYS}{me.index}")  # of a former run of this process
        self._tell("host", socket.gethostname())
        # Reading may hang where process 0 does, so another thread counts the seconds.
        self._threads = [
            threading.Thread(target=target, name=f"r1jax peers {target.__name__}", daemon=True)
            for target in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """This process has done its part; nobody is to miss it."""
        self._stop_looking()
        self._tell("end", "left")

    def see_all(self) -> None:
        """Returns when all others have shown that they live; the threads know what to do if not."""
        before = [told["seen"] for told in self._read().values() if "seen" in told]
        self._wait_until(
            lambda told: "end" in told or told.get("seen") not in before, seconds=LIMIT + GRACE
        )

    def fail(self, error: BaseException) -> None:
        """Says so and waits for the others to end; if they would not have, skips JAX's exit."""
        self._stop_looking()
        self._tell("end", " ".join(f"failed {type(error).__name__}: {error}".split())[:500])
        told = self._wait_until(
            lambda told: "end" in told or "gone" in told, seconds=GRACE + 4 * BEAT
        )
        if any("end" not in told.get(peer, {}) for peer in range(self._count)):
            atexit.register(self._exit_at_once)  # comes before JAX's, which is older

    def _exchange(self) -> None:
        beats = 0
        while not self._over.is_set():
            beats += 1
            with suppress(jax.errors.JaxRuntimeError):  # the store goes with process 0
                self._tell("seen", f"{self._index}:{beats}")
                told = self._read(None if self._index == 0 else 0)
                self._sightings.note(told, time.monotonic())
                if self._index > 0 and "verdict" in told.get(0, {}):
                    self._end(told[0]["verdict"])
            self._over.wait(BEAT)

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._over.wait(BEAT / 2):
            now = time.monotonic()
            if now - before > 2 * BEAT:  # this process stood still, and read nothing
                self._sightings.excuse(now - before)
            before = now
            verdict = self._sightings.verdict(now)
            if verdict is not None:
                self._end(verdict)

    def _end(self, verdict: str) -> None:
        self._ending.acquire()  # never released: it is said once
        print(f"\n{_sentence(verdict, self._index)}", file=sys.stderr, flush=True)
        self._exit(EXIT_PEER_LOST, verdict=verdict)

    def _exit_at_once(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._exit(1)

    def _exit(self, status: int, **told: str) -> None:
        """Without JAX, whose exit waits for all processes."""

        def tell() -> None:
            with suppress(jax.errors.JaxRuntimeError):
                for what, value in {**told, "gone": "now"}.items():
                    self._tell(what, value)

        try:
            telling = threading.Thread(target=tell, daemon=True)  # it hangs where process 0 does
            telling.start()
            telling.join(BEAT)
            if self._index == 0:  # JAX ends, in its own words, whoever is still there when 0 goes
                self._wait_until(
                    lambda told: "gone" in told or told.get("end") == "left", seconds=3 * BEAT
                )
            if self._witness is not None:
                self._witness.dismiss()
        finally:
            os._exit(status)

    def _wait_until(self, done: Callable[[Told], bool], seconds: float) -> dict[int, Told]:
        """What the processes told, as soon as all others are done; at the latest in `seconds`."""
        until = time.monotonic() + seconds
        while True:
            told = self._read()
            others = [told.get(peer, {}) for peer in range(self._count) if peer != self._index]
            if all(map(done, others)) or time.monotonic() > until:
                return told
            time.sleep(BEAT / 4)

    def _stop_looking(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(BEAT)
        if self._witness is not None:
            self._witness.dismiss()

    def _tell(self, what: str, value: str) -> None:
        self._store.key_value_set(f"{_KEYS}{self._index}/{what}", value, allow_overwrite=True)

    def _read(self, peer: int | None = None) -> dict[int, Told]:
        """What all processes told, or one."""
        told: dict[int, dict[str, str]] = {}
        folder = _KEYS if peer is None else f"{_KEYS}{peer}/"
        for key, value in self._store.key_value_dir_get(folder):
            number, what = key.removeprefix(_KEYS).split("/")
            told.setdefault(int(number), {})[what] = value
        return {**told}


class _Witness:
    """Says that process 0 is lost where this process cannot: JAX ends it in the same moment.

    A child, which does nothing until this process is gone. If process 0 is, too, it says so.
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
        """This process ends by itself."""
        with suppress(OSError, ValueError):  # it is gone already, or dismissed
            self._child.communicate(b"dismissed", timeout=BEAT)


def _sentence(verdict: str, index: int) -> str:
    return (
        f"{verdict[0].upper()}{verdict[1:]}. Process {index} ({socket.gethostname()}) stops, with "
        f"exit status {EXIT_PEER_LOST}."
    )
