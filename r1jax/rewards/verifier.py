"""The pool of worker processes in which reward functions run.

A symbolic verifier on a model's text may hang, fill the memory or crash. So each worker is a
separate process with a memory limit, and a thread of the parent applies the deadline: a worker
that is late is killed with SIGKILL, and a new one scores the other rows. The late part is wrong if
the reference can be read alone, so that no model learns answers that hang the verifier; else it has
failed and is masked.

Neither signals nor the main thread are needed, so a `Verifier` works from any thread.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1jax.rewards.functions import IMPORT_REMEDY
from r1jax.rewards.registry import (
    REWARDS,
    Outcome,
    RewardInput,
    Score,
    check_reward,
    sample_groups,
)
from r1jax.rewards.supervisor import set_undumpable

if TYPE_CHECKING:  # workers start sooner without pydantic
    from r1jax.settings.rewards import RewardSection, VerifierSection

_log = logging.getLogger(__name__)

# A batch is one message. Its rows are bounded so that workers share the load, its characters so
# that the message stays small.
_BATCH_ROWS = 64
_BATCH_CHARACTERS = 1_000_000
# Starting is imports, not rows; on a crowded machine they take a while.
_START_SECONDS = 120.0
_LOAD_SECONDS = 120.0  # for each reward
_WARN_SECONDS = 10.0  # until a message says which function is awaited
# A worker that dies between rows is replaced; one that always does is an error.
_RETRIES = 3


class VerifierError(RuntimeError):
    """The pool itself cannot work: workers do not start, or it is closed.

    reward: the name of the reward that a worker could not load, or None.
    """

    def __init__(self, message: str, reward: str | None = None) -> None:
        super().__init__(message)
        self.reward = reward


@dataclass(frozen=True)
class RowScore:
    """All rewards of one row.

    Attributes:
      reward: weighted sum of the parts; nan when a part with a weight failed.
      scored: every part with a weight has a value. Other rows are masked, not taken for 0.
      parts: reward name -> score, in the config's order.
    """

    reward: float
    scored: bool
    parts: dict[str, Score] = field(default_factory=dict)

    @property
    def _main(self) -> Score | None:
        return self.parts.get("accuracy") or next(iter(self.parts.values()), None)

    @property
    def outcome(self) -> Outcome:
        """The outcome of `accuracy`; without it, of the first reward that the row has."""
        return Outcome.VERIFIER_FAILED if self._main is None else self._main.outcome

    @property
    def deadline(self) -> str | None:
        """The cause of a deadline: `answer`, `reference` or `unknown`; None: there was none."""
        return next((each.deadline for each in self.parts.values() if each.deadline), None)

    @property
    def extracted(self) -> str | None:
        """The final answer as read by `accuracy`; without it, by the first reward of the row."""
        return None if self._main is None else self._main.extracted


def combine(parts: Mapping[str, Score], weights: Mapping[str, float]) -> RowScore:
    """The weighted sum of a row's parts; a failed part of weight 0 does not spoil it.

    A row without any part (no reward is for its domain) is not scored.
    """
    if not parts:
        return RowScore(math.nan, False)
    weighted = [name for name in parts if weights[name] != 0]
    if any(parts[name].outcome is Outcome.VERIFIER_FAILED for name in weighted):
        return RowScore(math.nan, False, dict(parts))
    total = math.fsum(weights[name] * parts[name].reward for name in weighted)
    return RowScore(total, True, dict(parts))


class Pending:
    """Rows that are being scored; made by `Verifier.submit`."""

    def __init__(
        self,
        rows: Sequence[RewardInput],
        rewards: Sequence[Sequence[str]],
        weights: Mapping[str, float],
    ) -> None:
        self._rows = rows
        self._weights = weights
        self._parts: list[dict[str, Score | None]] = [dict.fromkeys(names) for names in rewards]
        self._left = sum(map(len, rewards))
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        if not self._left:
            self._done.set()

    def _set(self, row: int, name: str, score: Score | None) -> None:
        with self._lock:
            self._parts[row][name] = score
            self._left -= 1
            if self._left == 0:
                self._done.set()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._left:
                self._error = error
                self._done.set()

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> list[RowScore]:
        """Waits, and returns one score per submitted row, in order.

        Raises:
          TimeoutError: `timeout` seconds passed; the rows are still being scored.
          VerifierError: the pool was closed, or cannot start workers any more.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"{self._left} rewards are not scored after {timeout} s")
        if self._error is not None:
            raise VerifierError(str(self._error)) from self._error
        return [
            combine({name: part for name, part in parts.items() if part is not None}, self._weights)
            for parts in self._parts
        ]


@dataclass
class _Batch:
    """Parts (row index, reward name) of one `Pending`, for one worker, in order.

    whole_rows: with columns and tokens. groups: it has all samples of each of its prompts.
    """

    pending: Pending
    parts: list[tuple[int, str]]
    whole_rows: bool
    groups: bool

    def message(self, start: int) -> dict[str, Any]:
        """Parts from `start` on; in groups, rows that are scored already stay in it without any."""
        rows: dict[int, list[str]] = {}
        for index, (row, name) in enumerate(self.parts):
            if index >= start or self.groups:
                rows.setdefault(row, []).extend([name] if index >= start else [])
        items = [
            {"row": self.pending._rows[row].message(whole=self.whole_rows), "rewards": names}
            for row, names in rows.items()
        ]
        return {"rows": items}


class _Died(Exception):
    """The worker process has ended; `str` says how."""


class _Late(Exception):
    """The worker did not reply before its deadline."""


class _Worker:
    """One worker process, as the parent sees it. Used by one thread, killed by any."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self.rows = 0
        self.groups = False
        self.columns: dict[str, list[str]] = {}
        self.loading: str | None = None  # the reward whose function is being imported
        self._received = b""
        self._lines: deque[bytes] = deque()
        self._ended = threading.Lock()
        self.process = subprocess.Popen(
            # -P: a file of the working directory does not hide a module of the library.
            [sys.executable, "-P", "-m", "r1jax.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            # In its own process group: the parent handles Ctrl-C, and a kill of the group ends
            # what a reward function started, too.
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        for stream in (self._stdin, self._stdout):
            os.set_blocking(stream.fileno(), False)
        # No reply is read here: the workers of a pool start in parallel, and the pool must be able
        # to kill this one while it starts.
        self._start = start
        self._id: tuple[str, int] = ("", 0)

    def wait_ready(self) -> None:
        """Sends the start message; raises VerifierError if the worker refuses it."""
        try:
            self.request(self._start, _START_SECONDS)
            reply = self.receive(_START_SECONDS)
            while "loading" in reply:
                self.loading = reply["loading"]
                reply = self.receive(_LOAD_SECONDS)
        except (_Late, _Died) as error:
            raise VerifierError(self._not_ready(error), self.loading) from None
        if "error" in reply:
            raise VerifierError(reply["error"], self.loading)
        self.groups = bool(reply.get("groups"))
        self.columns = reply["columns"]

    def _not_ready(self, error: _Late | _Died) -> str:
        late = isinstance(error, _Late)
        if self.loading is None:
            why = f" in {_START_SECONDS:g} s" if late else f": {error}"
            return f"a worker did not start{why}"
        function = self._start["rewards"][self.loading]["function"]
        what = f"importing {function.rpartition(':')[0]}" if ":" in function else "preparing it"
        why = f"did not end in {_LOAD_SECONDS:g} s" if late else f"ended the worker: {error}"
        remedy = f"; {IMPORT_REMEDY}" if ":" in function else ""
        return f"rewards.{function}: {what} {why}{remedy}"

    def request(self, message: Mapping[str, Any], seconds: float) -> None:
        """Writes all of `message`; the worker, which is idle, reads it at once."""
        self._id = (secrets.token_hex(16), 0)
        until = time.monotonic() + seconds
        left = memoryview(json.dumps({**message, "id": self._id[0]}).encode() + b"\n")
        while left:
            remaining = max(0.0, until - time.monotonic())
            if not select.select([], [self._stdin], [], remaining)[1]:
                raise _Late
            try:
                left = left[os.write(self._stdin.fileno(), left) :]
            except BlockingIOError:
                continue
            except OSError:
                raise _Died(self._death()) from None

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next reply. One that has arrived counts, however late this thread reads it.

        Lines without the id of this reply are not the worker's, and are left out.
        """
        until = time.monotonic() + seconds
        while True:
            while not self._lines:
                remaining = max(0.0, until - time.monotonic())
                if not select.select([self._stdout], [], [], remaining)[0]:
                    raise _Late
                chunk = os.read(self._stdout.fileno(), 1 << 16)
                if not chunk:
                    raise _Died(self._death())
                *lines, self._received = (self._received + chunk).split(b"\n")
                self._lines.extend(lines)
            try:
                reply = json.loads(self._lines.popleft())
            except (ValueError, RecursionError):
                continue
            if isinstance(reply, dict) and reply.get("id") == list(self._id):
                self._id = (self._id[0], self._id[1] + 1)
                return reply

    def _death(self) -> str:
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}"

    def kill(self) -> None:
        """SIGKILL to the process and what it started; may be called twice, from any thread."""
        with self._ended:
            try:
                # Not after it was waited for: the id may belong to another process then.
                if self.process.returncode is None:
                    os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Kills the process and closes the pipes; called by the thread that reads them."""
        self.kill()
        self._stdin.close()
        self._stdout.close()


def _environment() -> dict[str, str]:
    """The parent's environment and import path: a worker imports what the parent can import."""
    path = [entry or os.getcwd() for entry in sys.path]
    package_root = str(Path(__file__).resolve().parents[2])
    if package_root not in path:
        path.insert(0, package_root)
    # Many workers share the machine, and per-thread stacks count against the memory limit.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**threads, **os.environ, "PYTHONPATH": os.pathsep.join(path)}


class Verifier:
    """Scores rows in worker processes. A context manager; `close` leaves no process behind.

    Args:
      rewards: reward name -> section (weight, options), as in the config.
      section: number of workers, deadline per row and reward, memory limit, recycling.
      folder: where files and modules of reward functions are looked for first.

    Attributes:
      columns: reward name -> the columns that its function needs, besides its options.

    Raises:
      ValueError: no rewards, an unknown one, or options it refuses.
      VerifierError: the workers do not start, for example because a module cannot be imported.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardSection],
        section: VerifierSection,
        folder: str | None = None,
    ) -> None:
        if not rewards:
            raise ValueError("rewards is empty: name at least one")
        if any(reward.options.get("minimum_isolation") == "limits" for reward in rewards.values()):
            set_undumpable()  # programs of this user do not read reference answers here
        for name, reward in rewards.items():
            check_reward(reward.function or name, reward.options, section)
        self._names = list(rewards)
        self._domains = {name: reward.domains for name, reward in rewards.items()}
        self._weights = {name: reward.weight for name, reward in rewards.items()}
        self._section = section
        self._rewards = {
            name: {"function": reward.function or name, "options": dict(reward.options)}
            for name, reward in rewards.items()
        }
        self._start = {
            "rewards": self._rewards,
            "memory_bytes": section.memory_mb << 20,
            "folder": folder,
        }
        functions = [reward.function or name for name, reward in rewards.items()]
        self._whole_rows = any(n not in REWARDS or REWARDS[n].reads_columns for n in functions)
        self._groups = False
        self.columns: dict[str, list[str]] = {}
        self._changed = threading.Condition()
        self._batches: deque[_Batch] = deque()
        self._open: set[Pending] = set()
        self._workers: set[_Worker] = set()
        self._ready = 0
        self._closing = False
        self._error: BaseException | None = None
        self._warned: set[tuple[str, str]] = set()
        self._loading: set[str] = set()  # rewards that a warning of slow imports named
        # One thread per worker, for as long as the pool lives: Linux ends a worker with the
        # thread that started it.
        self._threads = [
            threading.Thread(target=self._serve, name=f"verifier-{index}", daemon=True)
            for index in range(section.workers)
        ]
        for thread in self._threads:
            thread.start()
        try:
            with self._changed:
                started = partial(self._is_started, section.workers)
                while not self._changed.wait_for(started, _WARN_SECONDS):
                    self._warn_of_loading()
                if self._error is not None:
                    raise self._error
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _is_started(self, workers: int) -> bool:
        return self._error is not None or self._ready == workers

    def _warn_of_loading(self) -> None:
        for name in {worker.loading for worker in self._workers} - self._loading:
            if name is not None:
                self._loading.add(name)
                _log.warning(
                    "rewards.%s: %s is still being imported; that is ended after %g s",
                    name,
                    self._rewards[name]["function"],
                    _LOAD_SECONDS,
                )

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        with self._changed:
            return sorted(worker.process.pid for worker in self._workers)

    def rewards_of(self, domain: str) -> list[str]:
        """The rewards that rows of a domain get."""
        limits = self._domains.items()
        return [name for name, only in limits if only is None or domain in only]

    def submit(self, rows: Sequence[RewardInput]) -> Pending:
        """Queues the rows and returns at once; `Pending.result` has the scores, in order.

        Raises:
          VerifierError: the pool is closed or broken.
        """
        rows = tuple(rows)
        names = [self.rewards_of(row.domain) for row in rows]
        pending = Pending(rows, names, self._weights)
        batches: list[_Batch] = []
        starts = {group.start for group in sample_groups(rows)} if self._groups else None
        share = math.ceil(len(rows) / (2 * len(self._threads)))  # some for every worker
        limit = max(1, min(_BATCH_ROWS, self._section.tasks_per_worker, share))
        parts: list[tuple[int, str]] = []
        count = characters = 0
        for index, row in enumerate(rows):
            parts.extend((index, name) for name in names[index])
            count += 1
            characters += len(row.completion) + len(row.prompt)
            whole = starts is None or index + 1 in starts
            if whole and (count >= limit or characters >= _BATCH_CHARACTERS):
                batches.append(_Batch(pending, parts, self._whole_rows, self._groups))
                parts, count, characters = [], 0, 0
        if parts:
            batches.append(_Batch(pending, parts, self._whole_rows, self._groups))
        with self._changed:
            if self._error is not None:
                raise VerifierError(str(self._error)) from self._error
            if self._closing:
                raise VerifierError("the verifier is closed")
            self._open = {each for each in self._open if not each.done()}
            self._open.add(pending)
            self._batches.extend(batches)
            self._changed.notify_all()
        return pending

    def close(self) -> None:
        """Kills the workers and waits for them; rows not yet scored raise VerifierError."""
        with self._changed:
            self._closing = True
            self._batches.clear()
            # A thread that waits for a reply sees the end of the process.
            for worker in self._workers:
                worker.kill()
            open_now, self._open = self._open, set()
            self._changed.notify_all()
        for pending in open_now:
            pending._fail(VerifierError("the verifier was closed before all rows were scored"))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    # What follows runs in the threads.

    def _serve(self) -> None:
        worker: _Worker | None = None
        try:
            worker = self._new_worker()
            with self._changed:
                self._ready += 1
                self._groups |= worker.groups
                self.columns = worker.columns
                self._changed.notify_all()
            while (batch := self._next_batch()) is not None:
                worker = self._score(batch, worker)
        except BaseException as error:
            self._break(error)
        finally:
            if worker is not None:
                self._drop(worker)

    def _next_batch(self) -> _Batch | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or bool(self._batches))
            return None if self._closing else self._batches.popleft()

    def _score(self, batch: _Batch, worker: _Worker) -> _Worker:
        """Scores a whole batch; returns the worker to go on with."""
        deadline = self._section.deadline_seconds
        rows = len({row for row, _ in batch.parts})
        if worker.rows and worker.rows + rows > self._section.tasks_per_worker:
            worker = self._replace(worker)
        position = 0
        deaths_between = 0
        while position < len(batch.parts):
            try:
                worker.request(batch.message(position), _START_SECONDS)
            except (_Died, _Late) as death:
                # It read no row, so none is the cause.
                deaths_between += 1
                if deaths_between > _RETRIES:
                    raise VerifierError(f"workers die while idle: {death}") from None
                worker = self._replace(worker)
                continue
            worker.rows += len({row for row, _ in batch.parts[position:]})
            while position < len(batch.parts):
                row, name = batch.parts[position]
                is_spent, late = True, False
                try:
                    score = _read_score(worker.receive(deadline))
                    # The heap may be full or fragmented then: a new process for the next row.
                    is_spent = score is not None and score.detail == "MemoryError"
                except _Late:
                    worker = self._replace(worker)
                    worker, score = self._late(worker, batch.pending._rows[row].answer, name)
                    late = True
                except _Died as death:
                    score = Score.failed(f"the worker died: {death}")
                if is_spent and self._closing:
                    return worker
                if score is not None and (late or score.outcome is Outcome.VERIFIER_FAILED):
                    self._warn_once(name, score.detail or "")
                position += 1
                batch.pending._set(row, name, score)
                if is_spent:
                    worker = worker if late else self._replace(worker)
                    break
        return worker

    def _late(self, worker: _Worker, reference: str, name: str) -> tuple[_Worker, Score]:
        """The score of a part that had none in time; `worker` is a new one."""
        deadline = self._section.deadline_seconds
        try:
            worker.request({"reference": reference, "reward": name}, _START_SECONDS)
            readable = worker.receive(deadline)["readable"]
        except (_Died, _Late):
            worker, readable = self._replace(worker), False
        score = Score(0.0, Outcome.WRONG) if readable else Score(math.nan, Outcome.VERIFIER_FAILED)
        cause = {True: "answer", False: "reference", None: "unknown"}[readable]
        detail = f"no answer in {deadline:g} s (cause: {cause})"
        return worker, replace(score, detail=detail, deadline=cause)

    def _replace(self, worker: _Worker) -> _Worker:
        self._drop(worker)
        return self._new_worker()

    def _new_worker(self) -> _Worker:
        with self._changed:  # so that close() kills every process, and none starts after it
            if self._closing:
                raise VerifierError("the verifier is closed")
            worker = _Worker(self._start)
            self._workers.add(worker)
        try:
            worker.wait_ready()
        except BaseException:
            self._drop(worker)
            raise
        return worker

    def _drop(self, worker: _Worker) -> None:
        worker.close()
        with self._changed:
            self._workers.discard(worker)

    def _break(self, error: BaseException) -> None:
        """The pool cannot go on: `result` and `submit` raise the error."""
        with self._changed:
            if self._closing:
                return
            self._error = self._error or error
            self._batches.clear()
            open_now, self._open = self._open, set()
            self._changed.notify_all()
        for pending in open_now:
            pending._fail(error)

    def _warn_once(self, name: str, detail: str) -> None:
        """The first failure of each kind goes to the log: a broken reward must not be silent."""
        kind = (name, detail.partition(":")[0])
        with self._changed:
            if kind in self._warned or len(self._warned) > 50:
                return
            self._warned.add(kind)
        _log.warning("reward %s failed on a row: %s", name, detail)


def _read_score(reply: Mapping[str, Any]) -> Score | None:
    try:
        if reply["reward"] is None:
            return None
        return Score(
            float(reply["reward"]), Outcome(reply["outcome"]), reply["extracted"], reply["detail"]
        )
    except (KeyError, TypeError, ValueError):
        raise _Died("its reply is not a score") from None
