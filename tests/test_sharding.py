"""A mesh changes where things are, never what comes out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from r1jax.models import ModelConfig, abstract_params
from r1jax.sharding import make_layout

SCRIPT = Path(__file__).parent / "on_a_mesh.py"


def test_samples_and_updates_agree_on_one_and_eight_devices() -> None:
    one_device = {"data": 1, "fsdp": 1, "tensor": 1}
    layouts: list[tuple[dict[str, int], bool, dict[str, int] | None]] = [
        ({"data": 2, "fsdp": 2, "tensor": 2}, True, None),
        # Rows in pieces of time. Two key heads on four devices, too.
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, True, None),
        ({"data": 2, "sequence": 4}, False, None),
        # Sampling with another layout of the same devices.
        ({"fsdp": 8}, True, {"data": 4, "tensor": 2}),
    ]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is nearly all of the time
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps([(one_device, False), *layouts])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout)
    assert one["split"] == 1
    for other, (axes, *_) in zip(others, layouts, strict=True):
        # The weights really are in pieces.
        assert other["split"] == axes.get("fsdp", 1) * axes.get("tensor", 1)
        assert other["tokens"] == one["tokens"]
        for name in ("log_probs", "grad_norms", "weights"):
            np.testing.assert_allclose(other[name], one[name], atol=2e-4, err_msg=name)
        # Sharded optimizer state that is not created sharded compiles the step twice.
        assert other["compilations"] == 1
    assert one["compilations"] == 1


def test_bad_meshes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mesh.axes .* needs a multiple of 3"):
        make_layout({"data": 3, "fsdp": -1}, devices=jax.devices()[:1])
    with pytest.raises(
        ValueError, match="mesh.rules.embedding: no such logical axis; known: .*embed"
    ):
        make_layout({"fsdp": -1}, {"embedding": "fsdp"}, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="mesh.rules.embed = 'model': mesh axes are fsdp"):
        make_layout({"fsdp": -1}, {"embed": "model"}, devices=jax.devices()[:1])
    clash = make_layout({"fsdp": -1}, {"mlp": "fsdp"}, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="'embed' and 'mlp' both map to mesh axis 'fsdp'"):
        clash.spec(("embed", "mlp"), name="gate")


def test_a_dimension_that_does_not_divide_is_named() -> None:
    layout = make_layout({"fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])

    class Mesh:
        shape = {"fsdp": 1, "tensor": 3}
        size = 3

    object.__setattr__(layout, "mesh", Mesh())
    config = ModelConfig("llama", 32, 16, 32, 2, 4, 2, 8)
    with pytest.raises(
        ValueError, match=r"embed: dimension 0 \('vocab', size 32\).*divisible by 3"
    ):
        abstract_params(config, layout, "float32")
