"""A few kills at random times; `make chaos` does as many as one likes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_runs_that_are_killed_at_random_times_end_with_the_same_bytes() -> None:
    command = [sys.executable, str(TESTS / "chaos.py"), "--kills", "4", "--kinds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"(\d+) kills in (\d+) runs, seed 0: (\d+) of (\d+) runs ended .*", last)
    assert found is not None and int(found[1]) == 4 and found[2] == found[3] == found[4]
