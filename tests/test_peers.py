"""Who is lost, and when that is said; real processes are in test_processes_failure.py."""

from __future__ import annotations

from r1jax.peers import BEAT, FIRST_LIMIT, GRACE, LIMIT, Sightings, watched_peers


def told(host: str, seen: int, end: str | None = None) -> dict[str, str]:
    return {"host": host, "seen": str(seen)} | ({} if end is None else {"end": end})


def test_a_process_is_lost_a_while_after_its_last_sign_of_life() -> None:
    sightings = Sightings([1, 2], now=100.0)
    sightings.note({1: told("b", 1), 2: told("c", 1)}, now=102.0)
    sightings.note({1: told("b", 1), 2: told("c", 2)}, now=120.0)
    # Process 1 was last seen at 102, process 2 at 120.
    assert sightings.verdict(102.0 + LIMIT) is None
    verdict = sightings.verdict(102.0 + LIMIT + 1)
    assert verdict is not None
    assert verdict.startswith("process 1 (b) is lost: it has not been seen for 41 s. The same ")
    sightings.note({1: told("b", 2), 2: told("c", 2)}, now=143.5)  # it lives after all
    assert sightings.verdict(144.0) is None


def test_all_is_said_within_a_minute() -> None:
    """Seen up to a beat late, judged each half beat, read a beat later, and process 0 waits."""
    assert LIMIT + BEAT + BEAT / 2 + BEAT + 3 * BEAT < 60


def test_processes_may_come_late_but_not_never() -> None:
    sightings = Sightings([1], now=0.0)
    assert sightings.verdict(FIRST_LIMIT) is None
    assert "process 1 (which never came) is lost" in str(sightings.verdict(FIRST_LIMIT + 1))
    sightings.note({1: told("b", 1)}, now=200.0)
    assert sightings.verdict(200.0 + LIMIT) is None


def test_what_left_is_not_missed() -> None:
    sightings = Sightings([1], now=0.0)
    sightings.note({1: told("b", 7, "left")}, now=10.0)
    assert sightings.verdict(10_000.0) is None


def test_a_failure_is_everybodys_at_first() -> None:
    sightings = Sightings([1, 2], now=0.0)
    failed = told("c", 3, "failed OSError: the disk is full")
    sightings.note({1: told("b", 3), 2: failed}, now=10.0)
    assert sightings.verdict(10.0 + GRACE) is None
    # It tells no more, and that is no reason to forget it.
    sightings.note({1: told("b", 4), 2: failed}, now=19.0)
    verdict = sightings.verdict(10.0 + GRACE + 1)
    assert verdict == "process 2 (c) failed with OSError: the disk is full"


def test_a_process_that_stood_still_does_not_blame_the_others() -> None:
    sightings = Sightings([1], now=0.0)
    sightings.note({1: told("b", 1)}, now=1.0)
    sightings.excuse(500.0)
    assert sightings.verdict(501.0 + LIMIT) is None
    assert sightings.verdict(501.0 + LIMIT + 1) is not None


def test_one_process_has_nobody_to_watch() -> None:
    with watched_peers():
        pass
