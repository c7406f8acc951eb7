"""Weights go from the devices that train to those that sample, and not by way of the host."""

from __future__ import annotations

import os
from pathlib import Path

import forked
from compiled_programs import devices

TESTS = Path(__file__).parents[1]
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax._src.array import ArrayImpl
from on_a_mesh import CONFIGS
from r1jax.models import Decoder, Execution, init_params
from r1jax.models.parameters import abstract_weights
from r1jax.sampler import make_rollout_weights, to_sample
from r1jax.sampler.rollout_weights import in_equal_parts
from r1jax.sharding import make_layout, make_rollout_layout, split_devices

for kind, sampling, axes, rollout, parts in [
    ("dense", 4, {"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}, 4),
    ("dense", 2, {"fsdp": 2, "data": 3}, {"tensor": 2}, 2),
    ("experts", 6, {"fsdp": 2}, {"expert": 2, "data": 3}, 2),
    ("dense", 3, {"data": 5}, {"data": 3}, 1),
]:
    train, sample = split_devices(jax.devices(), sampling)
    rules = {} if kind == "dense" else {"expert": "expert"}
    layout = make_layout(axes, devices=train, in_order=True)
    layout_of_sampler = make_rollout_layout(layout, rollout, devices=sample)
    execution = Execution(compute_dtype=jnp.bfloat16, scan_layers=True, expert_chunk=8)
    model = Decoder(CONFIGS[kind], execution, layout)
    sampler = to_sample(model, layout_of_sampler)
    sent, received = in_equal_parts(model, sampler)
    assert dict(sent.layout.mesh.shape) == {"fsdp": parts, "data": len(train) // parts}
    assert dict(received.layout.mesh.shape) == {"fsdp": parts, "data": sampling // parts}
    params = init_params(jax.random.key(0), model.config, layout)

    def on_host(self):
        raise AssertionError("by way of the host")

    value = ArrayImpl._value
    ArrayImpl._value = property(on_host)
    moved = make_rollout_weights(model, sampler)(params)
    jax.block_until_ready(moved)
    ArrayImpl._value = value
    for leaf, new, wanted in zip(
        jax.tree.leaves(params), jax.tree.leaves(moved), jax.tree.leaves(abstract_weights(sampler)),
        strict=True,
    ):
        assert new.sharding == wanted.sharding and new.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(leaf.astype(new.dtype)), np.asarray(new))
"""


def test_weights_are_copied_from_device_to_device_in_equal_parts() -> None:
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = forked.run("-c", SCRIPT, env=os.environ | devices(8) | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr[-3000:]
