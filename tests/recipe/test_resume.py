"""Killed anywhere and started again = never killed, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest

TESTS = Path(__file__).parents[1]
# In this order, on one run: dead in pretraining, in a save, in an export, in the evaluation; asked
# to stop in the RL stage's first held-out evaluation (in the third batch, behind those of the
# evaluation); dead in its log, asked to stop between two batches of a rollout, and in its log, dead
# in its save, and behind its last held-out evaluation, in its export.
DEATHS = [
    ("log", 4),
    ("save", 1),
    ("export", 1),
    ("samples", 2),
    ("sigterm_in_judging", 3),
    ("log", 4),
    ("sigterm_in_rollout", 3),
    ("sigterm", 1),
    ("save", 1),
    ("export", 1),
]
# One of them: what every change is tried with.
ONE_DEATH = [("sigterm_in_rollout", 3)]

# Of dynamic sampling: dead in the second phase; asked to stop in it; dead in the save behind the
# third, which leaves surplus, and in the fourth, which begins with that.
DYNAMIC_DEATHS = [("log", 3), ("sigterm_in_judging", 2), ("save", 2), ("log", 3)]


def start(
    output: Path,
    point: str = "none",
    number: int = 0,
    config: tuple[str, ...] = ("tiny.yaml",),
    run: Callable[..., subprocess.CompletedProcess[str]] = forked.run,
) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [str(TESTS / "killed_run.py"), point, str(number), str(TESTS / config[0])]
    done = run(*command, f"output={output}", *config[1:], env=environment, timeout=300)
    assert done.returncode in (0, -9, 143), done.stderr[-3000:]
    return done.returncode


def new_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """One whose `hash` has another seed."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def result(output: Path) -> dict[str, bytes]:
    """What must not depend on when the process died: all but times and checkpoints' files."""
    (run,) = output.iterdir()
    varies = ("timings.jsonl", "run.json", "results.json", "report.html")
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.name not in varies and "checkpoints" not in path.parts
    }


@pytest.mark.parametrize("deaths", [ONE_DEATH, pytest.param(DEATHS, marks=pytest.mark.slow)])
def test_killed_and_resumed_ends_with_the_same_bytes(
    tmp_path: Path, deaths: list[tuple[str, int]]
) -> None:
    assert start(tmp_path / "whole", run=new_process) == 0
    for point, number in deaths:
        code = start(tmp_path / "killed", point, number)
        assert code == (143 if point.startswith("sigterm") else -9), (point, number)
    assert start(tmp_path / "killed") == 0
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


@pytest.mark.slow
def test_what_a_phase_leaves_to_the_next_is_in_the_checkpoint(tmp_path: Path) -> None:
    config = ("tiny_dynamic.yaml",)
    assert start(tmp_path / "whole", config=config) == 0
    for point, number in DYNAMIC_DEATHS:
        code = start(tmp_path / "killed", point, number, config)
        assert code == (143 if point.startswith("sigterm") else -9), (point, number)
    assert start(tmp_path / "killed", config=config) == 0
    whole, killed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name in whole:
        assert whole[name] == killed[name], f"{name} differs"
    lines = whole["stages/00-zero/metrics.jsonl"].decode().splitlines()
    phases = [json.loads(line) for line in lines[::2]]
    # Something of all that a phase can come to.
    assert {phase["questions/sampled"] for phase in phases} == {8, 12}
    assert min(phase["groups/trained"] for phase in phases) < 4
    assert phases[2]["groups/surplus"] == phases[3]["groups/from_surplus"] > 0
    assert any(phase["questions/skipped"] for phase in phases)
    assert phases[3]["sampler/gap_max"] > 0.01 > phases[2]["sampler/gap_max"]  # of old samples
    timings = (tmp_path / "whole/tiny-dynamic-s0/stages/00-zero/timings.jsonl").read_text()
    counts = [json.loads(line)["compile_count"] for line in timings.splitlines()]
    assert counts[1] == counts[-1]  # whatever the number of groups


TWO_GROUPS = "{cpu_devices: 2, axes: {data: 1}, rollout: {axes: {data: 1}, devices: 1}}"


@pytest.mark.slow
def test_a_run_that_is_stopped_as_it_samples_beside_an_update_goes_on_with_the_same_weights(
    tmp_path: Path,
) -> None:
    lag = ("stages.zero.dynamic_sampling=null", "stages.zero.phases_of_lag=1")
    config = ("tiny_dynamic.yaml", *lag, f"mesh={TWO_GROUPS}")
    assert start(tmp_path / "whole", config=config) == 0
    sampled_beside = False
    # In the second phase; asked to stop as one is sampled beside an update; in a later save.
    for point, number in [("log", 3), ("sigterm_in_judging", 3), ("save", 1)]:
        code = start(tmp_path / "killed", point, number, config)
        assert code == (143 if point.startswith("sigterm") else -9), (point, number)
        kept = (tmp_path / "killed/tiny-dynamic-s0/stages/00-zero/checkpoints").glob("*/arrays")
        sampled_beside |= any("sampling" in (at / "_METADATA").read_text() for at in kept)
    assert sampled_beside
    assert start(tmp_path / "killed", config=config) == 0
    whole, killed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name in whole:
        assert whole[name] == killed[name], f"{name} differs"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ("dynamic_sampling=null", "phases_of_lag=1"),
        ("dynamic_sampling=null", "tokens_per_phase=2", "max_new_tokens=6", "steps=12"),
        ("phases_of_lag=1", "tokens_per_phase=2", "max_new_tokens=4", "sampling.stop=['1+']"),
    ],
)
def test_samples_of_older_weights_are_in_the_checkpoint(
    tmp_path: Path, changes: tuple[str, ...]
) -> None:
    config = ("tiny_dynamic.yaml", *(f"stages.zero.{change}" for change in changes))
    assert start(tmp_path / "whole", config=config) == 0
    # In the second phase; asked to stop in it; in the save behind the third; in the fourth.
    for point, number in [("log", 3), ("sigterm_in_judging", 2), ("save", 2), ("log", 3)]:
        code = start(tmp_path / "killed", point, number, config)
        assert code == (143 if point.startswith("sigterm") else -9), (point, number)
    assert start(tmp_path / "killed", config=config) == 0
    whole, killed = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name in whole:
        assert whole[name] == killed[name], f"{name} differs"
