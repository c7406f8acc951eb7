"""Killed anywhere and started again = never killed, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# In this order, on one run: dead in pretraining, in a save, in an export, in the evaluation; asked
# to stop in the RL stage's first held-out evaluation (in the fourth batch, as the evaluation still
# had two); dead in its log, asked to stop between two batches of a rollout, and in its log, dead in
# its save, and behind its last held-out evaluation, in its export.
DEATHS = [
    ("log", 4),
    ("save", 1),
    ("export", 1),
    ("samples", 2),
    ("sigterm_in_judging", 4),
    ("log", 4),
    ("sigterm_in_rollout", 3),
    ("sigterm", 1),
    ("save", 1),
    ("export", 1),
]
# The same, less often: what every change is tried with.
SOME_DEATHS = [("sigterm_in_rollout", 3), ("save", 1)]


def start(output: Path, cache: Path, point: str, number: int) -> int:
    command = [sys.executable, str(TESTS / "killed_run.py"), point, str(number)]
    command += [str(TESTS / "tiny.yaml"), f"output={output}"]
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -9, 143), done.stderr[-3000:]
    return done.returncode


def result(output: Path) -> dict[str, bytes]:
    """What must not depend on when the process died: all but times and checkpoints' files."""
    run = output / "tiny-s0"
    varies = ("timings.jsonl", "run.json", "results.json", "report.html")
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in varies and "checkpoints" not in path.parts
    }


@pytest.mark.parametrize("deaths", [SOME_DEATHS, pytest.param(DEATHS, marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_bytes(
    tmp_path: Path, deaths: list[tuple[str, int]]
) -> None:
    cache = tmp_path / "cache"
    assert start(tmp_path / "whole", cache, "none", 0) == 0
    for point, number in deaths:
        code = start(tmp_path / "killed", cache, point, number)
        assert code == (143 if point.startswith("sigterm") else -9), (point, number)
    assert start(tmp_path / "killed", cache, "none", 0) == 0
    whole, killed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert "stages/02-zero/model/model.safetensors" in whole
    for name in whole:
        assert whole[name] == killed[name], f"{name} differs"
    zero = tmp_path / "killed" / "tiny-s0" / "stages" / "02-zero"
    rows = [json.loads(line) for line in (zero / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    # Held-out evaluations are there once each; the first is of the weights that `before` evaluated.
    evaluated = [json.loads(line) for line in (zero / "held_out.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in evaluated] == [0, 4, 8]
    assert evaluated[0] == json.loads(whole["stages/01-before/summary.json"])
    # The weights did move, in pretraining and in RL: equal bytes are not those of a run that did
    # nothing.
    models = [whole[f"stages/{stage}/model/model.safetensors"] for stage in ("00-base", "02-zero")]
    assert models[0] != models[1]
    # Nothing is compiled after the first rollout phase.
    timings = (tmp_path / "whole" / "tiny-s0" / "stages" / "02-zero" / "timings.jsonl").read_text()
    counts = [json.loads(line)["compile_count"] for line in timings.splitlines()]
    assert len(counts) == 4
    assert counts[1] == counts[-1]
