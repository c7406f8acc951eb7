"""All hostile programs in every tier that works here, as this user and, for root, as another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from r1jax.rewards.sandbox import Isolation

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("hostile_programs.py")
# A user id that is nobody's, for what root starts as another.
USER = 60042
_PROBE = """
import subprocess, sys
import psutil, pydantic, r1jax.rewards, sympy
subprocess.run([sys.executable, "-c", ""], check=True)
"""


def start(user: str) -> list[str]:
    """The Python for a user; skips where there is none."""
    if user == "as this user":
        return [sys.executable]
    if os.geteuid() != 0:
        pytest.skip("only root starts programs as another user")
    change = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    for python in (sys.executable, "/usr/bin/python3"):
        probe = [*change, python, "-c", _PROBE]
        if subprocess.run(probe, env=environment(), capture_output=True).returncode == 0:
            return [*change, python]
    pytest.skip("no Python here that other users may run has what r1jax needs")


def environment() -> dict[str, str]:
    path = [str(REPOSITORY), str(SCRIPT.parent), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("user", ["as this user", "as another user"])
@pytest.mark.parametrize("tier", list(Isolation))
def test_no_hostile_program_gets_anywhere(tier: Isolation, user: str) -> None:
    command = start(user)
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to other users
        attacked(command, tier, user, Path(name))


def attacked(command: list[str], tier: Isolation, user: str, folder: Path) -> None:
    folder.chmod(0o755)
    if user != "as this user":
        os.chown(folder, USER, USER)
    ended = subprocess.run(
        [*command, str(SCRIPT), tier, str(folder)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    if ended.returncode == 77:
        pytest.skip(ended.stdout.strip())
    assert ended.returncode == 0
    found = json.loads(ended.stdout)
    right = {name for name, (_, outcome, _) in found["results"].items() if outcome == "right"}
    masked = {n: detail for n, (_, o, detail) in found["results"].items() if o == "verifier_failed"}
    assert right == set(), f"they got what they wanted: {sorted(right)}"
    assert masked == {}, "they were not judged"
    assert len(found["results"]) > 150
    assert (found["processes"], found["files"]) == ({}, []), "they left something behind"
    assert not psutil.Process().children(recursive=True)
