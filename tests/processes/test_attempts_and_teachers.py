"""Two processes with several attempts at a question, or with a teacher, do what one does."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from safetensors.numpy import load_file

TESTS = Path(__file__).parents[1]
# Of several updates of a phase each process gives its own first questions to the first one.
ONE_UPDATE = "mini_batches_per_rollout=1"


def run(config: str, output: Path, processes: int, *changes: str) -> Path:
    """The stages of a run on two devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = str(2 // processes)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_NUM_CPU_DEVICES": devices,
    }
    started = [
        forked.Process(
            *("one_of_many.py", str(port), str(processes), str(index), config),
            *(f"output={output}", "mesh.axes={data: 2}", f"mesh.cpu_devices={devices}", *changes),
            env=environment,
            cwd=TESTS,
            one_output=True,
        )
        for index in range(processes)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    (found,) = output.glob("*/stages")
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(one: Path, two: Path) -> None:
    """Metrics and weights to float tolerance; of samples all that is no number."""
    for path in sorted(one.glob("*/metrics.jsonl")):
        other = two / path.relative_to(one)
        for alone, shared in zip(rows(path), rows(other), strict=True):
            assert alone.keys() == shared.keys()
            for name, value in alone.items():
                where = f"{path.parent.name}: {name}"
                np.testing.assert_allclose(
                    float(shared[name]), float(value), atol=2e-4, err_msg=where
                )
    for path in sorted(one.glob("*/samples.jsonl")):
        kept = ("step", "problem_id", "sample", "prompt", "completion", "outcome", "turns")
        found = [
            [{key: row.get(key) for key in kept} for row in rows(each)]
            for each in (path, two / path.relative_to(one))
        ]
        assert found[0] == found[1], path.parent.name
    for path in sorted(one.glob("*/model/model.safetensors")):
        weights = load_file(path), load_file(two / path.relative_to(one))
        for name, value in weights[0].items():
            np.testing.assert_allclose(weights[1][name], value, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_make_the_attempts_of_one(tmp_path: Path) -> None:
    """In training, held out, and in an evaluation."""
    changes = [f"stages.zero.{each}" for each in ("questions_per_step=4", "steps=2", ONE_UPDATE)]
    changes.append("stages.after.problems_per_batch=4")
    one, two = (run("tiny_turns.yaml", tmp_path / str(n), n, *changes) for n in (1, 2))
    assert_same(one, two)
    measured = rows(one / "00-zero/metrics.jsonl")
    assert len(measured) == 2 and min(row["optimizer/grad_norm"] for row in measured) > 1e-3
    assert {len(row["turns"]) for row in rows(one / "01-after/samples.jsonl")} == {3}


@pytest.mark.slow
def test_two_processes_learn_the_teacher_of_one(tmp_path: Path) -> None:
    """From rows, from samples alone, and beside rewards, by a teacher of another vocab."""
    changes = ["stages.offline.rows_per_step=4", f"stages.beside.{ONE_UPDATE}"]
    one, two = (run("tiny_distil.yaml", tmp_path / str(n), n, *changes) for n in (1, 2))
    assert_same(one, two)
    for stage in ("03-offline", "04-alone", "05-beside"):
        measured = rows(one / stage / "metrics.jsonl")
        assert all(row["distillation/divergence"] > 0 for row in measured), measured[0].keys()
