"""Which process is lost, and when; real processes are in processes/test_failure.py."""

from __future__ import annotations

from r1jax.peers import GRACE, INTERVAL, JOIN_TIMEOUT, TIMEOUT, _Heartbeats, watched_peers


def status(host: str, heartbeat: int, end: str | None = None) -> dict[str, str]:
    return {"host": host, "heartbeat": str(heartbeat)} | ({} if end is None else {"end": end})


def test_a_process_is_lost_a_while_after_its_last_sign_of_life() -> None:
    heartbeats = _Heartbeats([1, 2], now=100.0)
    heartbeats.update({1: status("b", 1), 2: status("c", 1)}, now=102.0)
    heartbeats.update({1: status("b", 1), 2: status("c", 2)}, now=120.0)
    # Process 1 was last seen at 102, process 2 at 120.
    assert heartbeats.verdict(102.0 + TIMEOUT) is None
    verdict = heartbeats.verdict(102.0 + TIMEOUT + 1)
    assert verdict is not None
    assert verdict.startswith("process 1 (b) is lost: it has not been seen for 41 s. The same ")
    heartbeats.update({1: status("b", 2), 2: status("c", 2)}, now=143.5)  # it runs after all
    assert heartbeats.verdict(144.0) is None


def test_a_lost_process_is_reported_within_a_minute() -> None:
    """Read an interval late, checked each half, read an interval later; and process 0 waits."""
    assert TIMEOUT + INTERVAL + INTERVAL / 2 + INTERVAL + 3 * INTERVAL < 60


def test_processes_may_come_late_but_not_never() -> None:
    heartbeats = _Heartbeats([1], now=0.0)
    assert heartbeats.verdict(JOIN_TIMEOUT) is None
    assert "process 1 (which never came) is lost" in str(heartbeats.verdict(JOIN_TIMEOUT + 1))
    heartbeats.update({1: status("b", 1)}, now=200.0)
    assert heartbeats.verdict(200.0 + TIMEOUT) is None


def test_a_process_that_left_is_not_lost() -> None:
    heartbeats = _Heartbeats([1], now=0.0)
    heartbeats.update({1: status("b", 7, "left")}, now=10.0)
    assert heartbeats.verdict(10_000.0) is None


def test_a_failure_may_be_that_of_all_processes_at_first() -> None:
    heartbeats = _Heartbeats([1, 2], now=0.0)
    failed = status("c", 3, "failed OSError: the disk is full")
    heartbeats.update({1: status("b", 3), 2: failed}, now=10.0)
    assert heartbeats.verdict(10.0 + GRACE) is None
    # It publishes nothing more, and is not forgotten.
    heartbeats.update({1: status("b", 4), 2: failed}, now=19.0)
    verdict = heartbeats.verdict(10.0 + GRACE + 1)
    assert verdict == "process 2 (c) failed with OSError: the disk is full"


def test_a_process_that_was_stopped_does_not_blame_the_others() -> None:
    heartbeats = _Heartbeats([1], now=0.0)
    heartbeats.update({1: status("b", 1)}, now=1.0)
    heartbeats.excuse(500.0)
    assert heartbeats.verdict(501.0 + TIMEOUT) is None
    assert heartbeats.verdict(501.0 + TIMEOUT + 1) is not None


def test_one_process_has_no_peers() -> None:
    with watched_peers():
        pass
