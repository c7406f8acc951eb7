"""Several processes, each with its own rows, do what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

TESTS = Path(__file__).parent
# One update a phase: several would be dealt out within each process.
CHANGES = [
    "mesh.axes={data: -1}",
    "stages.zero.mini_batches_per_rollout=1",
    "stages.zero.questions_per_step=4",
    "stages.zero.steps=3",
    "stages.zero.checkpoint_every=3",
    "stages.before.problems_per_batch=4",  # of 6 problems: the last batch is not whole
    # Equal to rounding is asked for below; a sample that flips would be no fault of the loop's.
    "stages.base.optimizer.learning_rate=0.001",
    "stages.zero.optimizer.learning_rate=0.001",
]


def run(output: Path, processes: int) -> Path:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "JAX_NUM_CPU_DEVICES": str(2 // processes),
    }
    started = [
        subprocess.Popen(
            [
                *(sys.executable, str(TESTS / "one_of_many.py"), str(port)),
                *(str(processes), str(index), str(TESTS / "tiny.yaml")),
                *(f"output={output}", f"mesh.cpu_devices={2 // processes}", *CHANGES),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(processes)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    # Process 0 speaks; the others have nothing to say.
    assert all("Report:" not in text and "zero" not in text for text in said[1:])
    return output / "tiny-s0"


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_train_and_evaluate_as_one(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    for stage in ("00-base", "02-zero"):
        metrics = [rows(run / "stages" / stage / "metrics.jsonl") for run in (one, two)]
        assert len(metrics[0]) == len(metrics[1]) > 2
        for alone, shared in zip(*metrics, strict=True):
            assert alone.keys() == shared.keys()
            np.testing.assert_allclose(list(shared.values()), list(alone.values()), atol=2e-4)
        weights = [
            load_file(run / "stages" / stage / "model/model.safetensors") for run in (one, two)
        ]
        for name, value in weights[0].items():
            np.testing.assert_allclose(weights[1][name], value, atol=2e-4, err_msg=name)
    samples = [rows(run / "stages/01-before/samples.jsonl") for run in (one, two)]
    assert samples[0] == samples[1]
    evaluated = [rows(run / "stages/02-zero/held_out.jsonl") for run in (one, two)]
    assert [row["step"] for row in evaluated[1]] == [0, 3]
    assert evaluated[0] == evaluated[1]
    assert json.loads((two / "run.json").read_text())["hardware"]["processes"] == 2
