"""A verifier worker: one process that scores rows, one part (row, reward) after the other.

Started by `r1jax.rewards.verifier` as `python -m r1jax.rewards.worker`, so that it never runs
the user's `__main__`, and imports neither jax nor transformers. It speaks JSON lines:

  in   {"rewards": {name: {"function": f, "options": o}}, "memory_bytes": n, "folder": d}   once
  out  {"loading": name}, before each reward; {"loading": null} after the last, or {"error": why}
  out  {"ready": true, "groups": whether a function wants all samples of a prompt, "columns": {name:
       the columns that it needs}} or {"error": why}
  in   {"reference": text, "reward": name}   after a deadline: who is the cause?
  out  {"readable": whether the reference can be read, or null if the function cannot say}
  in   {"rows": [{"row": {field: value}, "rewards": [name, ...]}, ...]}
  out  {"reward": r, "outcome": o, "extracted": e, "detail": d}  per part, in order, at once; or
       {"reward": null} where the function has nothing to say of the row

Each part is answered before the next one starts, so the parent knows by counting which part it
waits for, and applies the deadline to it. Every message in has an `id`, drawn at random, and every
reply `"id": [that id, number of the reply]`, so that nobody else can write one; and since the
process is not dumpable, nobody but root reads the reference answers in it.

JSON, not pickle: what comes out of a process that
handled a model's text is data, never code.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from r1jax.rewards.functions import load_reward
from r1jax.rewards.registry import (
    Outcome,
    RewardEntry,
    RewardInput,
    RewardOptions,
    Score,
    sample_groups,
)
from r1jax.rewards.supervisor import set_undumpable


def _die_with_parent() -> None:
    """Asks Linux for a SIGKILL when the parent's thread that started us is gone.

    Elsewhere an idle worker still ends with its pipe, and a busy one after its current part.
    """
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGKILL)
    # The parent may have died before the call: then its pipe is closed, and the first read ends.


def _limit_memory(limit: int) -> str | None:
    """Sets the limit of the address space; returns the problem if more is in use already."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not sys.platform.startswith("linux"):  # macOS does not keep RLIMIT_AS
        return None
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    if used + (16 << 20) > limit:
        return (
            f"verifier.memory_mb = {limit >> 20}: a worker takes {used >> 20} MB before its first "
            f"row; give at least {(used >> 20) + 256}"
        )
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return None


def _take_channels() -> tuple[BinaryIO, BinaryIO]:
    """The parent's pipes, moved to other descriptors.

    A reward function that prints must not write into the replies: standard output becomes
    standard error, and standard input is empty.
    """
    requests, replies = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb", buffering=0)


def _score_rows(
    entry: RewardEntry, rows: Sequence[RewardInput], options: RewardOptions
) -> list[Score | None]:
    """Calls a reward function; whatever it raises is a failed verifier, not a wrong answer."""
    try:
        if entry.batch is not None:
            return [_checked(score) for score in entry.batch(rows, options)]
        return [_checked(entry.function(row, options)) for row in rows]
    except MemoryError:
        return [Score.failed("MemoryError")] * len(rows)
    except BaseException as error:  # SystemExit too: a reward function does not end the worker
        return [Score.failed(f"{type(error).__name__}: {str(error)[:500]}")] * len(rows)


def _checked(score: Score | None) -> Score | None:
    if score is None:
        return None
    outcome = Outcome(score.outcome)
    value = float(score.reward)
    if outcome is Outcome.VERIFIER_FAILED:
        return Score.failed(score.detail or "the reward function says so")
    if not math.isfinite(value):
        return Score.failed(f"returned the reward {value}")
    extracted = None if score.extracted is None else str(score.extracted)
    return Score(value, outcome, extracted, score.detail)


def _scores(
    entries: Mapping[str, tuple[RewardEntry, RewardOptions]], items: Sequence[Mapping[str, Any]]
) -> Iterator[Score | None]:
    """The score of each part, in order; each is computed when the one before it was taken."""
    rows = [RewardInput(**item["row"]) for item in items]
    for group in sample_groups(rows):
        together: dict[str, list[Score | None]] = {}
        for index in group:
            for name in items[index]["rewards"]:
                entry, options = entries[name]
                if entry.batch is None:
                    yield _score_rows(entry, [rows[index]], options)[0]
                    continue
                if name not in together:
                    together[name] = _score_rows(entry, [rows[i] for i in group], options)
                yield together[name][index - group.start]


def _readable(entry: RewardEntry, options: RewardOptions, reference: str) -> bool | None:
    if not entry.checks_references:
        return None
    try:
        return entry.check_reference(reference, options) is None
    except Exception:
        return False


def _reply(score: Score) -> dict[str, object]:
    return {
        "reward": score.reward,
        "outcome": score.outcome.value,
        "extracted": score.extracted,
        "detail": score.detail,
    }


def _send(replies: BinaryIO, id: list[object], message: Mapping[str, object]) -> None:
    data = memoryview(json.dumps({"id": id, **message}).encode() + b"\n")
    while data:
        data = data[replies.write(data) :]


def main() -> None:
    """Serves until the parent closes the pipe."""
    requests, replies = _take_channels()
    _die_with_parent()
    set_undumpable()
    try:
        start = json.loads(requests.readline() or b"null")
        if start is None:
            return
        entries: dict[str, tuple[RewardEntry, RewardOptions]] = {}
        # The parent knows by these messages which function ends the process, or never returns.
        try:
            for name, reward in start["rewards"].items():
                _send(replies, [start["id"], len(entries)], {"loading": name})
                options = reward["options"]
                entry = load_reward(reward["function"], options, start.get("folder"))
                entry.prepare(options)
                entries[name] = (entry, options)
        except Exception as error:
            message = {"error": str(error) or type(error).__name__}
            _send(replies, [start["id"], len(entries) + 1], message)
            return
        _send(replies, [start["id"], len(entries)], {"loading": None})
        problem = _limit_memory(start["memory_bytes"])
        if problem is not None:
            _send(replies, [start["id"], len(entries) + 1], {"error": problem})
            return
        groups = any(entry.batch is not None for entry, _ in entries.values())
        columns = {name: entry.columns for name, (entry, _) in entries.items()}
        ready = {"ready": True, "groups": groups, "columns": columns}
        _send(replies, [start["id"], len(entries) + 1], ready)
        while line := requests.readline():
            request = json.loads(line)
            if "reference" in request:
                readable = _readable(*entries[request["reward"]], request["reference"])
                _send(replies, [request["id"], 0], {"readable": readable})
                continue
            for number, score in enumerate(_scores(entries, request["rows"])):
                reply = {"reward": None} if score is None else _reply(score)
                _send(replies, [request["id"], number], reply)
    except BrokenPipeError:  # the parent is gone
        pass


if __name__ == "__main__":
    main()
