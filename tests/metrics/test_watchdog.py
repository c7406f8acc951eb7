"""A process that stands still says where, and only ends where it is told to."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest

from r1jax.metrics.heartbeat import HEARTBEAT, _Heartbeat, span
from r1jax.metrics.watchdog import EXIT_HUNG, Watchdog

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def heartbeat() -> Iterator[_Heartbeat]:
    """The process's record, at step 12 of a stage; as it was before, afterwards."""
    HEARTBEAT.begin_stage("zero")
    HEARTBEAT.set_step(12)
    yield HEARTBEAT
    HEARTBEAT.begin_stage("")


@pytest.fixture
def parked() -> Iterator[None]:
    """A thread that waits in a function of that name."""
    released = threading.Event()

    def waits_for_another_process() -> None:
        released.wait()

    thread = threading.Thread(target=waits_for_another_process)
    thread.start()
    yield
    released.set()
    thread.join()


def test_it_tells_what_stands_still_since_when_and_where(
    tmp_path: Path, heartbeat: _Heartbeat, parked: None, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    watchdog = Watchdog(60, tmp_path / "hangs", process_index=3, end=ended.append)
    with span("held_out"), span("rollout"):
        since = heartbeat.last_beat
        watchdog.check(since + 59)
        assert capfd.readouterr().err == "" and not (tmp_path / "hangs").exists()
        watchdog.check(since + 61)
    assert ended == []
    said = capfd.readouterr().err
    assert said.startswith("[process 3] watchdog: no progress for 61 s, since ")
    assert "stage zero, step 12, in held_out > rollout (watchdog.seconds = 60)" in said
    assert "first compilation" in said and "another process" in said
    # Of every thread, the innermost frame first.
    assert "in waits_for_another_process" in said
    assert "in test_it_tells_what_stands_still" in said
    (file,) = (tmp_path / "hangs").iterdir()
    assert re.fullmatch(r"process-3-\d{8}-\d{6}\.txt", file.name) and str(file) in said
    assert "in waits_for_another_process" in file.read_text()
    assert file.read_text().startswith("process 3: no progress for 61 s")


def test_it_speaks_more_and_more_rarely_and_of_the_end(
    tmp_path: Path, heartbeat: _Heartbeat, capfd: pytest.CaptureFixture[str]
) -> None:
    watchdog = Watchdog(10, tmp_path)
    since = heartbeat.last_beat
    spoken = []
    for second in range(100):
        watchdog.check(since + second)
        spoken += [second] * ("no progress" in capfd.readouterr().err)
    assert spoken == [10, 20, 40, 80]
    heartbeat.beat()
    watchdog.check(heartbeat.last_beat + 1)
    assert "watchdog: progress again, after" in capfd.readouterr().err
    watchdog.check(heartbeat.last_beat + 9)
    assert capfd.readouterr().err == ""
    watchdog.check(heartbeat.last_beat + 10)  # from the start
    assert "no progress for 10 s" in capfd.readouterr().err


@pytest.mark.parametrize("abort", [False, True])
def test_it_ends_the_process_only_with_abort(tmp_path: Path, abort: bool) -> None:
    ended: list[int] = []
    watchdog = Watchdog(10, tmp_path, abort=abort, end=ended.append)
    watchdog.check(HEARTBEAT.last_beat + 9)
    assert ended == []
    watchdog.check(HEARTBEAT.last_beat + 11)
    assert ended == [EXIT_HUNG] * abort


def test_a_file_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hangs").write_text("in the way")
    ended: list[int] = []
    watchdog = Watchdog(10, tmp_path / "hangs", abort=True, end=ended.append)
    watchdog.check(HEARTBEAT.last_beat + 11)
    said = capfd.readouterr().err
    assert "in test_a_file_that_cannot_be_written" in said and "cannot be written" in said
    assert ended == [EXIT_HUNG]


def test_spans_are_beats_and_end_whatever_happens(heartbeat: _Heartbeat) -> None:
    before = heartbeat.beats
    with pytest.raises(KeyError), span("rollout"):
        assert heartbeat.spans == ["rollout"] and heartbeat.beats == before + 1
        raise KeyError
    assert heartbeat.spans == [] and heartbeat.beats == before + 2
    assert str(heartbeat) == "stage zero, step 12, after rollout"

    @span("update")
    def update(x: int, *, y: int) -> int:
        assert heartbeat.spans == ["update"]
        return x + y

    assert update(1, y=2) == 3 == update(1, y=2)
    assert heartbeat.last_span == "update"
    heartbeat.begin_stage("next")
    assert str(heartbeat) == "stage next, step 0"
    assert str(_Heartbeat()) == "before the first stage"


def test_its_thread_sees_a_hang_and_nothing_else(
    tmp_path: Path, heartbeat: _Heartbeat, capfd: pytest.CaptureFixture[str]
) -> None:
    with Watchdog(600, tmp_path / "lively"):
        pass
    with Watchdog(0.2, tmp_path / "hangs"):
        deadline = time.monotonic() + 60
        while "watchdog: no progress" not in capfd.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not (tmp_path / "lively").exists() and list((tmp_path / "hangs").iterdir())
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_run_that_hangs_ends_with_the_status_that_is_started_again(tmp_path: Path) -> None:
    """Before the first step, too: another process may have failed its checks."""
    program = (
        "import sys, time\n"
        "from r1jax.config.load import load_config\n"
        "from r1jax import recipe\n"
        "recipe.check = lambda context: time.sleep(600)\n"
        "recipe.run(load_config(sys.argv[1], sys.argv[2:]))\n"
    )
    ended = forked.run(
        *("-c", program, str(TESTS / "tiny.yaml"), f"output={tmp_path}"),
        "watchdog={seconds: 0.5, abort: true}",
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )
    assert ended.returncode == EXIT_HUNG == 134, ended.stderr
    assert "before the first stage" in ended.stderr and "in run" in ended.stderr
    (file,) = (tmp_path / "tiny-s0" / "hangs").iterdir()
    assert file.name.startswith("process-0-")
