"""Devices in two groups: one samples the next phase while the other trains."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from r1jax.config.load import ConfigError, load_config
from r1jax.run.models import make_layouts

TESTS = Path(__file__).parents[1]
LAG = ("stages.zero.dynamic_sampling=null", "stages.zero.phases_of_lag=1")
# Two heads, of which each has keys and values: two devices share them.
TRAINED = (*LAG, "model.config.num_key_value_heads=2")


def mesh(training: str, sampling: str, devices: int) -> str:
    return f"mesh={{axes: {training}, rollout: {{axes: {sampling}, devices: {devices}}}}}"


ONE_AND_ONE = mesh("{data: 1}", "{data: 1}", 1)


def start(
    *command: str, devices: int, output: Path, status: int = 0
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    more = (f"mesh.cpu_devices={devices}", f"output={output}")
    done = forked.run(*command, *more, env=environment, cwd=TESTS)
    assert done.returncode == status, done.stderr[-3000:]
    return done


def run(output: Path, devices: int, *changes: str) -> Path:
    start("-m", "r1jax", "run", "tiny_dynamic.yaml", *changes, devices=devices, output=output)
    return output / "tiny-dynamic-s0/stages/00-zero"


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one device, which samples and trains in turn."""
    return run(tmp_path_factory.mktemp("in_turn"), 1, *TRAINED)


def test_samples_come_while_the_update_runs_and_are_those_of_one_group(
    in_turn: Path, tmp_path: Path
) -> None:
    command = ("two_groups.py", "tiny_dynamic.yaml", *TRAINED, ONE_AND_ONE)
    done = start(*command, devices=2, output=tmp_path)
    events = json.loads(done.stdout.rpartition("EVENTS")[2])
    of_samples = "samples, while an update runs"
    first = events.index("update 1 begins")
    assert set(events[:first]) == {"samples"}
    # Both updates of the phase are queued; all of the next one is sampled; only then are they over.
    assert events[first : first + 3] == ["update 1 begins", "update 2 begins", of_samples]
    last = events.index("update 1 ended")
    assert set(events[first + 2 : last]) == {of_samples}
    assert [e for e in events if e.startswith("update")] == [
        f"update {step + n} {what}"
        for step in (1, 3, 5, 7)
        for what in ("begins", "ended")
        for n in (0, 1)
    ]
    # Of each kind of work one device does all, as before: the same to the last bit.
    apart = tmp_path / "tiny-dynamic-s0/stages/00-zero"
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (in_turn / name).read_bytes() == (apart / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "groups",
    [
        (3, "{fsdp: 2}", "{data: 1}", 1),
        (6, "{fsdp: 2}", "{data: 2, tensor: 2}", 4),
        (8, "{fsdp: 2, tensor: 2}", "{data: 4}", 4),
    ],
)
def test_groups_of_several_devices_train_on_the_same_samples(
    in_turn: Path, groups: tuple[int, str, str, int], tmp_path: Path
) -> None:
    devices, *of_mesh = groups
    apart = run(tmp_path, devices, *TRAINED, mesh(*of_mesh))
    for one, two in zip(rows(in_turn), rows(apart), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(two[name], one[name], atol=2e-4, rtol=2e-3, err_msg=name)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (in_turn, apart)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=2e-3, err_msg=name)
    samples = [rows(each, "samples.jsonl") for each in (in_turn, apart)]
    assert [row["completion"] for row in samples[0]] == [row["completion"] for row in samples[1]]


def test_memory_is_counted_for_each_group(tmp_path: Path) -> None:
    command = ("-m", "r1jax", "run", "tiny_dynamic.yaml", *LAG, "--dry-run")
    groups = mesh("{fsdp: 2}", "{data: 2}", 2)
    said = start(*command, groups, devices=4, output=tmp_path).stdout
    assert "devices: 4 x cpu, mesh fsdp 2; beside it 2 devices sample, mesh data 2" in said
    lines = [line.strip() for line in said.splitlines() if line.strip().startswith("zero: ")]
    kinds = {line.rpartition("  ")[0].strip() for line in lines}
    beside = {kind for kind in kinds if kind.endswith("(devices that sample)")}
    assert "zero: key-value cache (devices that sample)" in beside
    assert "zero: sampler's weights (devices that sample)" in beside
    assert {"zero: optimizer moments", "zero: reference policy"} <= kinds - beside
    assert not any("optimizer" in kind or "gradients" in kind for kind in beside)
    assert not any("cache" in kind for kind in kinds - beside)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            LAG[:1],
            r"mesh\.rollout\.devices = 1 with stages\.zero\.phases_of_lag = 0: .* set phases_of",
        ),
        ((*LAG, "mesh.rollout.devices=0"), r"mesh\.rollout\.devices.*0"),
    ],
)
def test_groups_that_would_wait_for_each_other_are_refused(
    changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(TESTS / "tiny_dynamic.yaml", [ONE_AND_ONE, *changes])


def test_a_run_that_never_samples_as_it_trains_is_refused(tmp_path: Path) -> None:
    plan = yaml.safe_load((TESTS / "tiny.yaml").read_text())
    plan["stages"] = plan["stages"][:1]
    plan["mesh"] = {"axes": {"data": 1}, "rollout": {"axes": {"data": 1}, "devices": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ConfigError, match=r"mesh\.rollout\.devices = 1: no stage samples while"):
        load_config(tmp_path / "config.yaml")


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            ("{data: 1}", "{data: 1}", 4),
            "mesh.rollout.devices = 4 of 4 devices leaves none",
        ),
        (
            ("{data: 1}", "{data: 1}", 3),
            "mesh.rollout.devices = 3 is not a multiple of 2, the p",
        ),
        (("{data: 3}", "{data: 2}", 2), r"mesh\.axes = .* 2 devices train and 2 sample"),
        (("{data: 2}", "{data: 1}", 2), r"mesh\.rollout\.axes = .* 2 devices train and 2 sample"),
    ],
)
def test_devices_that_do_not_add_up_are_refused(groups: tuple[str, str, int], message: str) -> None:
    """Two processes, two devices each."""
    config = load_config(TESTS / "tiny_dynamic.yaml", [*LAG, mesh(*groups)])
    devices: Any = [Device(i, i // 2) for i in range(4)]
    with pytest.raises(ValueError, match=message):
        make_layouts(config.mesh, devices)
