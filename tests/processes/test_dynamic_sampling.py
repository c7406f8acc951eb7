"""Two processes with dynamic sampling choose, share and train on the groups that one does."""

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
CHANGES = [
    "mesh.axes={data: 2}",
    "stages.zero.mini_batches_per_rollout=1",
    "stages.zero.questions_per_step=4",
    "stages.zero.steps=6",
]


def run(output: Path, processes: int, *changes: str, devices: int = 2) -> Path:
    """Of so many devices in all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
    }
    command = ["tiny_dynamic.yaml", f"output={output}", f"mesh.cpu_devices={devices // processes}"]
    started = [
        forked.Process(
            *("one_of_many.py", str(port), str(processes), str(index)),
            *(*command, *CHANGES, *changes),
            env=environment,
            cwd=TESTS,
            one_output=True,
        )
        for index in range(processes)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(said)
    return output / "tiny-dynamic-s0/stages/00-zero"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        (),
        # Whitened over all tokens of a phase, whichever process has them.
        ("stages.zero.objective={kind: reinforce_plus_plus, kl_coefficient: 0.2}",),
        (
            "stages.zero.dynamic_sampling=null",
            "stages.zero.tokens_per_phase=2",
            "stages.zero.max_new_tokens=4",
            "stages.zero.phases_of_lag=1",
            "stages.zero.checkpoint_every=1",
        ),
    ],
)
def test_two_processes_train_on_the_groups_of_one(tmp_path: Path, changes: tuple[str, ...]) -> None:
    one, two = run(tmp_path / "one", 1, *changes), run(tmp_path / "two", 2, *changes)
    same_phases(one, two)
    carried = ("groups/from_surplus", "samples/continued")
    phases = rows(one / "metrics.jsonl")
    assert any(phase.get(name) for phase in phases for name in carried)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [(), ("stages.zero.objective={kind: ppo}",)])  # and a critic
def test_each_process_has_devices_that_sample_and_devices_that_train(
    tmp_path: Path, objective: tuple[str, ...]
) -> None:
    changes = ("stages.zero.phases_of_lag=1", *objective)
    in_turn = run(tmp_path / "in_turn", 1, *changes)
    groups = "mesh.rollout={axes: {data: 2}, devices: 2}"
    same_phases(in_turn, run(tmp_path / "apart", 2, *changes, groups, devices=4))


@pytest.mark.slow
def test_processes_that_train_on_other_parts_than_they_sample_do_as_one(tmp_path: Path) -> None:
    """A pair of devices that samples lies across both: each reads all rows, and trains on half."""
    changes = ("stages.zero.phases_of_lag=1", "model.config.num_key_value_heads=2")
    in_turn = run(tmp_path / "in_turn", 1, *changes)
    groups = "mesh.rollout={axes: {tensor: 2}, devices: 2}"
    same_phases(in_turn, run(tmp_path / "apart", 2, *changes, groups, devices=4))


def same_phases(one: Path, two: Path) -> None:
    phases = rows(one / "metrics.jsonl")
    for alone, shared in zip(phases, rows(two / "metrics.jsonl"), strict=True):
        assert alone.keys() == shared.keys()
        for name, value in alone.items():
            if name.startswith(("questions/", "groups/", "samples/")):
                assert shared[name] == value, name
            np.testing.assert_allclose(float(shared[name]), float(value), atol=2e-4, err_msg=name)
    files = [path.relative_to(one) for path in one.glob("*/model.safetensors")]
    assert len(files) == 1 + ("critic/loss" in phases[0])
    for file in files:
        weights = [load_file(folder / file) for folder in (one, two)]
        for name, value in weights[0].items():
            np.testing.assert_allclose(weights[1][name], value, atol=2e-4, err_msg=name)
