"""The worker pool against answers and reward functions that misbehave."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from r1jax.rewards import (
    Outcome,
    RewardInput,
    RowScore,
    Score,
    Verifier,
    VerifierError,
    score,
    score_file,
)
from r1jax.rewards.symbolic import UnreadableReference
from r1jax.rewards.verifier import combine
from r1jax.settings.rewards import RewardSection, VerifierSection

RIGHT, FAILED = Outcome.RIGHT, Outcome.VERIFIER_FAILED

MODULE = '''
import ctypes, json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
from r1jax.rewards import registry
from r1jax.rewards.registry import Outcome, Score

REPLIES = max(d for d in range(3, 20) if os.path.exists(f"/proc/self/fd/{d}")
              and os.readlink(f"/proc/self/fd/{d}").startswith("pipe:"))

def hangs(row, options):
    if "hang" in row.completion or "hang" in row.answer:
        time.sleep(600)
    return Score(1.0, Outcome.RIGHT)

def check(answer, options):
    if "hang" in answer:
        time.sleep(600)
    return "unreadable" if answer == "?" else None

accuracy = registry.REWARDS["accuracy"]
if os.environ.get("HANGS"):  # of this worker
    registry.REWARDS["accuracy"] = replace(accuracy, function=hangs, check_reference=check)

def act(row, options):
    """Does what the completion says."""
    print("noise on standard output")
    word = row.completion
    if word == "sleep":
        time.sleep(600)
    if word == "exit":
        sys.exit(3)
    if word == "_exit":
        os._exit(3)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "allocate":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 20))
    if word == "raise":
        raise KeyError("no such thing")
    if word == "nan":
        return Score(float("nan"), Outcome.RIGHT)
    if word == "text":
        return "one"
    if word == "child":
        child = subprocess.Popen(["sleep", "600"])
        Path(options["file"]).write_text(str(child.pid))
        time.sleep(600)
    if word == "modules":
        heavy = ("jax", "transformers", "torch", "numpy", "tensorflow", "pydantic")
        return Score(1.0, Outcome.RIGHT, ",".join(m for m in heavy if m in sys.modules))
    if word == "dumpable":
        return Score(1.0, Outcome.RIGHT, str(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)))
    if word == "forge":
        forged = {"reward": 9.0, "outcome": "right", "extracted": "forged", "detail": None}
        for line in (forged, {**forged, "id": ["0" * 32, 0]}, []):
            os.write(REPLIES, json.dumps(line).encode() + b"\\n")
        os.write(REPLIES, b"no JSON\\n" + b"[" * 99999 + b"\\n")
    if word == "stdin":
        return Score(1.0, Outcome.RIGHT, repr(sys.stdin.read()))
    return Score(1.0, Outcome.RIGHT, str(os.getpid()))
'''


@pytest.fixture
def acting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "acting_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "acting_rewards:act"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert not left, left


def pool(*names: str, options: dict[str, Any] | None = None, **limits: Any) -> Verifier:
    limits = {"deadline_seconds": 20.0, "memory_mb": 1024, **limits}
    rewards = {name: RewardSection(options=options or {}) for name in names}
    return Verifier(rewards, VerifierSection(**limits))


def rows(*completions: str, answer: str = "3") -> list[RewardInput]:
    return [RewardInput("p", completion, answer) for completion in completions]


def outcomes(scores: list[RowScore]) -> list[str]:
    return [score.outcome.value for score in scores]


def test_scores_come_in_order_from_several_workers_and_submissions() -> None:
    with pool("accuracy", options={"symbolic": False}, workers=2) as verifier:
        many = [RewardInput("p", f"\\boxed{{{i}}}", str(i - i % 3)) for i in range(1000)]
        first, second = verifier.submit(many), verifier.submit(many[::-1])
        expected = [float(i % 3 == 0) for i in range(1000)]
        assert [score.reward for score in second.result()] == expected[::-1]
        assert [score.reward for score in first.result()] == expected
        assert [score.extracted for score in first.result()] == [str(i) for i in range(1000)]
        assert first.done() and len(verifier.pids) == 2
        assert verifier.submit([]).result() == []


def test_answers_that_hang_sympy_cost_only_their_own_row(tmp_path: Path) -> None:
    target = tmp_path / "written"
    code = f"__import__('os').system('touch {target}')"
    completions = [
        "\\boxed{3}",
        "\\boxed{5^{5^{5^{5^5}}}}",
        "\\boxed{\\sqrt{9}}",
        f"\\boxed{{{code}}}",
        f"<answer>{code}</answer>",
        "\\boxed{1+2}",
        "nothing",
        "\\boxed{4}",
    ]
    with pool("accuracy", "format", deadline_seconds=2.0) as verifier:
        scores = verifier.submit(rows(*completions)).result()
    got = outcomes(scores)
    assert got[:3] == ["right", "wrong", "right"]
    assert got[3] != "right" and got[4] != "right"
    assert got[5:] == ["right", "unparseable", "wrong"]
    assert not target.exists()
    # Its other parts are there.
    assert scores[1].reward == 0 and scores[1].parts["format"].outcome is Outcome.WRONG
    assert all(score.scored for score in scores)


@pytest.mark.parametrize(
    ("word", "detail"),
    [
        ("exit", "SystemExit"),
        ("_exit", "exit status 3"),
        ("kill", "SIGKILL"),
        ("allocate", "MemoryError"),
        ("raise", "KeyError: 'no such thing'"),
        ("nan", "returned the reward nan"),
        ("text", "TypeError: returned str; needs a Score"),
    ],
)
def test_only_the_guilty_row_fails(acting: str, word: str, detail: str) -> None:
    with pool(acting, memory_mb=256) as verifier:
        scores = verifier.submit(rows("ok", "ok", word, "ok", word, "ok")).result()
    assert [s.outcome for s in scores] == [RIGHT, RIGHT, FAILED, RIGHT, FAILED, RIGHT]
    assert detail in str(scores[2].parts[acting].detail)
    assert math.isnan(scores[2].reward) and not scores[2].scored


def test_a_late_reward_function_is_killed_with_its_children(acting: str, tmp_path: Path) -> None:
    file = tmp_path / "child"
    with pool(acting, options={"file": str(file)}, deadline_seconds=0.7) as verifier:
        scores = verifier.submit(rows("ok", "child", "ok")).result()
        assert [s.outcome for s in scores] == [RIGHT, FAILED, RIGHT]
        child = int(file.read_text())
        assert scores[0].extracted != scores[2].extracted  # another process
    for _ in range(100):  # it may be a zombie until its new parent looks
        if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"the child {child} of a killed worker lives")


def test_workers_import_no_jax_and_their_pipes_are_out_of_reach(acting: str) -> None:
    with pool("accuracy", acting) as verifier:
        scores = verifier.submit(rows("modules", "stdin")).result()
    assert [score.parts[acting].extracted for score in scores] == ["", "''"]


def test_workers_are_recycled_and_replaced_when_they_die_idle(acting: str) -> None:
    with pool(acting, tasks_per_worker=2) as verifier:
        pids = [score.extracted for score in verifier.submit(rows(*["ok"] * 6)).result()]
        assert len(set(pids)) == 3 and pids[0] == pids[1] and pids[4] == pids[5]
        (pid,) = verifier.pids
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)], timeout=0.2)
        (score,) = verifier.submit(rows("ok")).result()
        assert score.outcome is RIGHT and score.extracted != str(pid)


def test_works_outside_the_main_thread_and_returns_at_once(acting: str) -> None:
    results: list[list[RowScore]] = []
    states: list[bool] = []

    def work() -> None:
        with pool(acting, deadline_seconds=0.7) as verifier:
            pending = verifier.submit(rows("sleep", "ok"))
            states.append(pending.done())
            with pytest.raises(TimeoutError):
                pending.result(timeout=0.01)
            results.append(pending.result())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [score.outcome for score in results[0]] == [FAILED, RIGHT]
    assert states == [False]  # submit did not wait for the sleeper


def test_close_kills_busy_workers_and_tells_who_waits(acting: str) -> None:
    verifier = pool(acting, workers=2, deadline_seconds=600.0)
    pending = verifier.submit(rows("sleep", "sleep", "sleep"))
    pids = verifier.pids
    verifier.close()
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(VerifierError, match="closed"):
        pending.result()
    with pytest.raises(VerifierError, match="closed"):
        verifier.submit(rows("ok"))
    verifier.close()


@pytest.mark.parametrize("word", ["ok", "sleep"])
def test_workers_end_with_a_parent_that_is_killed(acting: str, word: str, tmp_path: Path) -> None:
    """Idle or busy. The parent has no `__main__` guard: workers must not run it again."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from r1jax.settings.rewards import RewardSection, VerifierSection\n"
        "from r1jax.rewards import RewardInput, Verifier\n"
        "limits = VerifierSection(workers=2, deadline_seconds=600)\n"
        f"verifier = Verifier({{{acting!r}: RewardSection()}}, limits)\n"
        f"verifier.submit([RewardInput('p', {word!r}, '')] * 2)\n"
        "time.sleep(0.2)\n"
        "print(*verifier.pids, flush=True)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        parent.kill()
        parent.wait()
    assert len(workers) == 2
    for worker in workers:
        for _ in range(200):
            if not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.05)
        else:
            worker.kill()
            pytest.fail("a worker outlived its parent")


def test_start_errors_name_the_remedy(acting: str) -> None:
    with pytest.raises(VerifierError, match="acting_rewards has no function 'missing'"):
        pool("acting_rewards:missing")
    with pytest.raises(VerifierError, match="no_such_module.*PYTHONPATH"):
        pool("no_such_module:f", workers=2)
    with pytest.raises(VerifierError, match="verifier.memory_mb = 64: .* give at least"):
        pool("accuracy", memory_mb=64)
    with pytest.raises(ValueError, match="did you mean 'format'"):
        pool("formats")
    with pytest.raises(ValueError, match="rewards is empty"):
        pool()


def test_weighted_sum_by_hand() -> None:
    parts = {"format": Score(1.0, RIGHT, "x"), "accuracy": Score(0.5, Outcome.WRONG, "y")}
    row = combine(parts, {"format": 0.25, "accuracy": 2.0})
    assert (row.reward, row.scored, row.outcome, row.extracted) == (1.25, True, "wrong", "y")
    parts["format"] = Score(math.nan, FAILED)
    row = combine(parts, {"format": 0.0, "accuracy": 2.0})  # only logged: spoils nothing
    assert (row.reward, row.scored) == (1.0, True)
    row = combine(parts, {"format": 0.25, "accuracy": 2.0})
    assert math.isnan(row.reward) and not row.scored
    assert combine({"format": parts["format"]}, {"format": 1.0}).outcome is FAILED


def write_rows(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def row(completion: str, answer: Any = "3", **more: Any) -> dict[str, Any]:
    return {"prompt": "p", "completion": completion, "answer": answer, **more}


def test_score_file(tmp_path: Path, acting: str) -> None:
    source = write_rows(
        tmp_path / "rows.jsonl",
        row("\\boxed{3}", id=7),
        "",
        row("\\boxed{4}", 3),
        row("three \u2014 \ud800"),
    )
    counts = score_file("accuracy", source, source, section=VerifierSection())
    assert counts == {"right": 1, "wrong": 1, "unparseable": 1, "verifier_failed": 0}
    scored = [json.loads(line) for line in source.read_text().splitlines()]
    assert [(r["reward"], r["outcome"], r["extracted"]) for r in scored] == [
        (1.0, "right", "3"),
        (0.0, "wrong", "4"),
        (0.0, "unparseable", None),
    ]
    assert scored[0]["id"] == 7 and scored[2]["completion"] == "three \u2014 \ud800"

    source = write_rows(tmp_path / "rows.jsonl", row("raise"), row("ok"))
    target = tmp_path / "scored.jsonl"
    assert score_file(acting, source, target, section=VerifierSection())["verifier_failed"] == 1
    scored = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r["reward"] for r in scored] == [None, 1.0]
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "not a JSON line"),
        ("[1]", "a list; needs one JSON object"),
        ({"prompt": "p", "answer": "3"}, "no column 'completion'; there are"),
        (row("x", None), "answer = None: must be text"),
        (row("x", True), "answer = True: must be text"),
        (row("x", truncated=1), "truncated = 1"),
    ],
)
def test_bad_rows_name_file_and_line_and_nothing_is_written(
    tmp_path: Path, bad: Any, message: str
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", row("\\boxed{3}"), "", bad)
    target = tmp_path / "scored.jsonl"
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: {message}"):
        score_file("accuracy", source, target, section=VerifierSection())
    assert not target.exists()


def test_one_completion_is_scored_in_this_process() -> None:
    right = score(r"<think>2 / 4</think>\boxed{0.5}", r"\frac12", "accuracy")
    assert right == Score(1.0, Outcome.RIGHT, "0.5")
    assert score("<think>a</think>b", "", "format", options={"style": "think"}).reward
    cut = score("<think>a</think>b", "", "format", truncated=True, options={"style": "think"})
    assert not cut.reward
    with pytest.raises(ValueError, match="did you mean 'accuracy'"):
        score("", "", "acuracy")
    with pytest.raises(ValueError, match=r"rewards\.choice\.options\.x: no such option"):
        score("", "", "choice", options={"x": 1})
    with pytest.raises(UnreadableReference):
        score(r"\boxed{A}", "forty", "choice")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_reply_without_its_id_is_not_the_workers(acting: str) -> None:
    with pool(acting) as verifier:
        scores = verifier.submit(rows("forge", "other", "forge", "dumpable")).result()
        pid = str(verifier.pids[0])
    assert [score.reward for score in scores] == [1.0] * 4
    assert [score.extracted for score in scores] == [pid, pid, pid, "0"]


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
def test_a_deadline_is_the_answers_fault_if_the_reference_can_be_read(
    acting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", "1")
    cases = [("hang", "3"), ("4", "hang"), ("hang", "?"), ("4", "3")]
    given = [RewardInput("p", completion, answer) for completion, answer in cases]
    # The module is imported before `accuracy` is looked up.
    with pool(acting, "accuracy", deadline_seconds=1.0) as verifier:
        scores = [score.parts["accuracy"] for score in verifier.submit(given).result()]
        causes = [score.deadline for score in verifier.submit(given).result()]
    assert [score.outcome for score in scores] == ["wrong", FAILED, FAILED, RIGHT]
    assert scores[0].reward == 0.0 and scores[0].detail == "no answer in 1 s (cause: answer)"
    assert causes == ["answer", "reference", "reference", None]


def test_nothing_is_known_of_a_function_that_checks_no_references(acting: str) -> None:
    with pool(acting, deadline_seconds=1.0) as verifier:
        (score,) = verifier.submit(rows("sleep")).result()
    assert score.outcome is FAILED and score.deadline == "unknown"


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
def test_where_programs_are_only_limited_the_trainer_is_closed_to_them(acting: str) -> None:
    script = f"""
import ctypes
from r1jax.rewards import Verifier
from r1jax.settings.rewards import RewardSection, VerifierSection
for options in ({{}}, {{"minimum_isolation": "limits"}}):
    with Verifier({{{acting!r}: RewardSection(options=options)}}, VerifierSection()):
        print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    assert ended.stdout.split() == ["1", "0"]
