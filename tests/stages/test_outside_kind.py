"""A kind of stage from one file outside of r1jax: run, killed and resumed, planned, reported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.planner.dry_run import describe
from r1jax.run.resolve import check, resolve

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config whose second stage is of the kind in tests/outside_kind.py."""
    whole: dict[str, Any] = yaml.safe_load((TESTS / "tiny_r1.yaml").read_text())
    data = {"texts": whole["data"]["texts"]}
    base = whole["stages"][0] | {"steps": 2, "rows_per_step": 8}
    distilled = base | {"name": "distilled", "kind": "outside_kind:Distil", "weights": "student"}
    distilled |= {"teacher": "base", "steps": 4, "checkpoint_every": 2}
    path = tmp_path_factory.mktemp("outside") / "plan.yaml"
    kept = {"name": "outside", "model": whole["model"], "models": whole["models"], "trackers": []}
    path.write_text(yaml.safe_dump({**kept, "data": data, "stages": [base, distilled]}))
    return path


def config(plan: Path, output: str = "runs", *changes: str) -> RunConfig:
    return load_config(str(plan), [f"output={plan.parent / output}", *changes])


def start(*command: str, status: int) -> str:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"}
    done = forked.run(*command, env=environment)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout


def test_killed_and_resumed_it_ends_as_if_never_killed_and_is_reported(plan: Path) -> None:
    assert recipe.run(config(plan, "whole")) == 0
    killed = [str(TESTS / "killed_run.py"), "log", "5", str(plan)]
    start(*killed, f"output={plan.parent / 'killed'}", status=-9)  # in its third step
    assert recipe.run(config(plan, "killed")) == 0
    whole, resumed = (plan.parent / name / "outside-s0" for name in ("whole", "killed"))
    for name in ("metrics.jsonl", "model/model.safetensors"):
        files = [run / "stages" / "01-distilled" / name for run in (whole, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert len((whole / "stages/01-distilled/metrics.jsonl").read_text().splitlines()) == 4
    report = (resumed / "report.html").read_text()
    assert "distillation by weight" in report and "distilled" in report


def test_what_it_refuses_is_refused_before_compute(plan: Path) -> None:
    wrong = config(plan, "refused", "models.student.config.vocab_size=24")
    with pytest.raises(ValueError, match=r"distilled\.teacher = 'base': vocabularies \[24, 20\]"):
        check(resolve(wrong))
    with pytest.raises(
        ValueError, match=r"distilled\.teacher = 'bse': neither an earlier train st"
    ):
        config(plan, "refused", "stages.distilled.teacher=bse")


def test_what_it_keeps_in_memory_is_described_and_planned(plan: Path) -> None:
    rows = {row["what"]: row["bytes"] for row in describe(config(plan))["memory"]}
    assert rows["distilled: teacher"] == rows["model.weights"] > rows["student.weights"]
    planned = start("-m", "r1jax", "plan", str(plan), "--fake-devices", "8", status=0)
    assert "distilled" in planned and "confidence" in planned
