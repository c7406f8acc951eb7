"""A run is the same on every mesh, also where it samples on another one than it trains on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from safetensors.numpy import load_file

TESTS = Path(__file__).parents[1]


def run(output: Path, devices: int, *changes: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = ["-m", "r1jax", "run", "tiny_meshes.yaml", f"output={output}"]
    command += [f"mesh.cpu_devices={devices}", *changes]
    return forked.run(*command, env=environment, cwd=TESTS)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one")
    done = run(output, 1)
    assert done.returncode == 0, done.stderr
    return output / "tiny-meshes-s0"


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        # Rows in pieces of time and of heads; sampling with tensor parallelism, and a rule for that
        # alone.
        "{axes: {fsdp: 2, sequence: 2, tensor: 2}, "
        "rollout: {axes: {data: -1, tensor: 2}, rules: {vocab: null}}}",
        # Sampling with all weights on every device.
        "{axes: {fsdp: 4}, rollout: {axes: {data: 4}}}",
    ],
)
def test_a_run_on_a_mesh_is_the_run_on_one_device(on_one: Path, mesh: str, tmp_path: Path) -> None:
    devices = 8 if "sequence" in mesh else 4
    done = run(tmp_path, devices, f"mesh={mesh}", f"mesh.cpu_devices={devices}")
    assert done.returncode == 0, done.stderr
    assert "rematerialization" not in done.stderr  # whole arrays on every device
    other = tmp_path / "tiny-meshes-s0"
    for stage in ("00-base", "01-rl"):
        folders = [each / "stages" / stage for each in (on_one, other)]
        steps = [rows(folder / "metrics.jsonl") for folder in folders]
        for one, many in zip(*steps, strict=True):
            assert one.keys() == many.keys()
            for name in one:
                np.testing.assert_allclose(many[name], one[name], atol=2e-4, rtol=2e-3)
        one, many = (load_file(folder / "model" / "model.safetensors") for folder in folders)
        assert one.keys() == many.keys()
        for name in one:
            np.testing.assert_allclose(many[name], one[name], atol=2e-3, err_msg=name)
    completions = [
        [row["completion"] for row in rows(each / "stages" / "02-after" / "samples.jsonl")]
        for each in (on_one, other)
    ]
    assert completions[0] == completions[1]


def test_what_the_mesh_for_sampling_does_not_divide_is_refused(tmp_path: Path) -> None:
    mesh = "{axes: {fsdp: 4}, rollout: {axes: {data: 3}}}"
    done = run(tmp_path, 4, f"mesh={mesh}", "mesh.cpu_devices=4")
    assert done.returncode == 2
    assert "mesh.rollout.axes = {'data': 3} needs a multiple of 3 devices" in done.stderr
