"""A mesh changes where things are, never what comes out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import jax
import numpy as np
import pytest
from compiled_programs import devices

from r1jax.config.load import load_config
from r1jax.models import ModelConfig, abstract_params
from r1jax.models.attention import head_repeats
from r1jax.processes import BatchSlice, process_batch_slice
from r1jax.run.models import Layouts
from r1jax.run.resolve import check_divided
from r1jax.sharding import (
    StandIn,
    batch_slices,
    given_cpu_devices,
    make_layout,
    make_rollout_layout,
    process_batch_parts,
    slices_within,
)

SCRIPT = Path(__file__).parent / "on_a_mesh.py"


Case = tuple[dict[str, int], bool, dict[str, int] | None]
LAYOUTS: dict[str, list[Case]] = {
    "dense": [
        ({"data": 2, "fsdp": 2, "tensor": 2}, True, None),
        # Rows in pieces of time. Two key heads on four devices, too.
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, True, None),
        ({"data": 2, "sequence": 4}, False, None),
        # Sampling with another layout of the same devices.
        ({"fsdp": 8}, True, {"data": 4, "tensor": 2}),
    ],
    "experts": [
        ({"expert": 2, "sequence": 2, "tensor": 2}, True, None),
        ({"data": 2, "fsdp": 2, "expert": 2}, False, {"expert": 8}),
    ],
}


@pytest.mark.parametrize("kind", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_samples_and_updates_agree_on_one_and_eight_devices(kind: str) -> None:
    one_device = {"data": 1, "fsdp": 1, "tensor": 1}
    layouts = LAYOUTS[kind]
    cases = json.dumps([(kind, *case) for case in [(one_device, False), *layouts]])
    done = forked.run(str(SCRIPT), cases, env=os.environ | devices(8))
    assert done.returncode == 0, done.stderr[-3000:]
    one, *others = json.loads(done.stdout)
    assert one["split"] == 1
    for other, (axes, *_) in zip(others, layouts, strict=True):
        # The weights really are in pieces.
        assert other["split"] == math.prod(n for axis, n in axes.items() if axis != "data")
        assert other["tokens"] == one["tokens"]
        for name in ("log_probs", "grad_norms", "figures"):
            np.testing.assert_allclose(other[name], one[name], atol=2e-4, err_msg=name)
        for name, weight in one["weights"].items():
            np.testing.assert_allclose(other["weights"][name], weight, atol=2e-4, err_msg=name)
        # Sharded optimizer state that is not created sharded compiles the step twice.
        assert other["compilations"] == 1
    assert one["compilations"] == 1


def test_devices_that_share_a_row_score_it_as_one_does() -> None:
    """Log-probs, entropies, the most likely tokens, divergences, and the gradients, of a vocab in
    parts; the gradient of the entropy is that of float64."""
    script = str(SCRIPT.with_name("scores_on_a_mesh.py"))
    done = forked.run(script, env=os.environ | devices(8))
    assert done.returncode == 0, done.stderr[-3000:]
    for case in json.loads(done.stdout):
        assert len(case) == 18
        assert max(case.values()) < 1e-4, case


def test_a_layout_that_samples_as_it_trains_is_the_same_layout() -> None:
    # Then weights stay where they are, and rows as well.
    training = make_layout({"data": 1, "fsdp": -1}, {"mlp": None}, jax.devices()[:1])
    assert make_rollout_layout(training, inherited={"mlp": None}) == training


def test_rules_for_sampling_come_after_those_for_training() -> None:
    training = make_layout({"fsdp": 1, "sequence": 1}, {"kv_heads": None}, jax.devices()[:1])
    sampling = make_rollout_layout(
        training, {"data": -1, "tensor": 1}, {"vocab": None}, inherited={"kv_heads": None}
    )
    rules = dict(sampling.rules)
    assert (rules["kv_heads"], rules["vocab"], rules["mlp"]) == ((), (), ("tensor",))
    # A token has no time to split; the devices of that axis take prompts.
    assert dict(make_rollout_layout(training).rules)["batch"] == ("fsdp", "sequence")


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({}, ""),
        ({"XLA_FLAGS": "--xla_dump_to=x"}, ""),
        (
            {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8"},
            "XLA_FLAGS=--xla_force_host_platform_device_count=8",
        ),
        ({"JAX_NUM_CPU_DEVICES": "4"}, "JAX_NUM_CPU_DEVICES=4"),
    ],
)
def test_what_made_the_cpu_several_devices(
    variables: dict[str, str], given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert given_cpu_devices() == given


class Shares(SimpleNamespace):
    """Stands for a layout, which can be hashed."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def split_batch(processes: Sequence[int], parts: Sequence[int]) -> Any:
    """A layout, as far as shares go: each device's process, and the part of a batch it holds."""
    places = [(slice(part, part + 1),) for part in parts]

    class Placed:
        def __getitem__(self, device: Any) -> tuple[slice]:
            return places[devices.index(device)]

    def same(self: Any, other: Any) -> bool:
        return self is other

    devices = [type("Device", (), {"process_index": p, "__eq__": same})() for p in processes]
    return Shares(
        mesh=SimpleNamespace(devices=np.asarray(devices), shape={"data": len(devices)}),
        shards=lambda _: max(parts) + 1,
        sharding=lambda _: SimpleNamespace(devices_indices_map=lambda _: Placed()),
        stands_for=None,
        one_slice=False,
    )


def test_the_parts_of_a_process_need_not_be_neighbours() -> None:
    # As on a slice, whose devices are not arranged host by host.
    apart = split_batch(processes=(0, 1, 0, 1), parts=(0, 1, 2, 3))
    assert process_batch_parts(apart, 0) == [0, 2] and process_batch_parts(apart, 1) == [1, 3]
    assert process_batch_slice(apart) == BatchSlice(0, 2)
    # A tensor axis that spans hosts: they read the same rows.
    assert process_batch_slice(split_batch((0, 1, 2, 3), (0, 0, 1, 1))) == BatchSlice(0, 2)


def test_processes_that_hold_parts_in_common_have_one_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parts of all of them, by way of others too."""
    # Pairs of a tensor axis across hosts of four devices, as the devices of a v6e:4x4 are arranged.
    pairs = split_batch(
        (0, 0, 0, 1, 0, 1, 1, 1, 2, 2, 2, 3, 2, 3, 3, 3), [i // 2 for i in range(16)]
    )
    assert batch_slices(pairs) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for process, index in ((0, 0), (1, 0), (2, 1), (3, 1)):
        monkeypatch.setattr(jax, "process_index", lambda i=process: i)
        assert process_batch_slice(pairs) == BatchSlice(index, 2)
        assert process_batch_parts(pairs) == batch_slices(pairs)[index]
    # 0 and 2 have no part in common, but each one with 1.
    chain = split_batch((0, 0, 1, 1, 2, 2), (0, 0, 0, 1, 1, 1))
    assert batch_slices(chain) == [[0, 1]]
    # Slices are equal. Pairs as in a v6e:4x4: processes 0 and 2 have four parts, 1 and 3 two each.
    held = {0: (0, 3, 7), 1: (1, 2), 2: (3, 6, 7), 3: (4, 5)}
    slice_4x4 = split_batch(*zip(*((p, part) for p in held for part in held[p]), strict=True))
    assert batch_slices(slice_4x4) == [[0, 3, 6, 7], [1, 2, 4, 5]]
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    assert process_batch_slice(slice_4x4) == BatchSlice(1, 2)
    # Of three parts and one no two equal slices can be made.
    unequal = split_batch((0, 0, 1, 1, 2, 2), (0, 1, 1, 2, 3, 3))
    assert batch_slices(unequal) == [[0, 1, 2, 3]]
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert process_batch_slice(unequal) == BatchSlice(0, 1)


def test_one_layouts_slices_within_anothers() -> None:
    halves, pair = split_batch((0, 0, 1, 1), (0, 1, 2, 3)), split_batch((0, 1), (0, 0))
    across = split_batch((0, 0, 1, 1), (0, 1, 1, 2))
    for whole in (pair, across):
        # Who has the same rows of the whole may have sampled other halves, but not the reverse.
        assert slices_within(halves, whole) and not slices_within(whole, halves)
        assert slices_within(whole, whole) and slices_within(whole, pair)
    halves = split_batch((0, 0, 1, 1), (0, 1, 2, 3))
    halves.one_slice = True
    assert batch_slices(halves) == [[0, 1, 2, 3]] and slices_within(pair, halves)


def test_devices_that_stand_in_are_on_hosts_in_their_order() -> None:
    def slices(hosts: int, *parts: int) -> list[list[int]]:
        layout = split_batch([0] * len(parts), parts)
        layout.stands_for = StandIn("tpu", hosts)
        return batch_slices(layout)

    assert slices(2, 0, 1, 2, 3) == [[0, 1], [2, 3]]
    assert slices(2, 0, 1, 0, 1) == [[0, 1]]
    assert slices(2, 0, 0, 1, 1, 2, 2) == [[0, 1, 2]]
    assert slices(4, 0, 0, 1, 1, 2, 2, 3, 3) == [[0], [1], [2], [3]]


def test_bad_meshes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mesh.axes .* needs a multiple of 3"):
        make_layout({"data": 3, "fsdp": -1}, devices=jax.devices()[:1])
    with pytest.raises(
        ValueError, match="mesh.rules.embedding: no such logical axis; known: .*embed"
    ):
        make_layout({"fsdp": -1}, {"embedding": "fsdp"}, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="mesh.rules.embed = 'model': mesh axes are fsdp"):
        make_layout({"fsdp": -1}, {"embed": "model"}, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="mesh.rollout.axes = .* needs a multiple of 2"):
        make_rollout_layout(make_layout({"fsdp": -1}, devices=jax.devices()[:1]), {"tensor": 2})
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
        ValueError,
        match=r"embed: dimension 0 \('vocab', size 32\).*divisible by 3, .*make it 1 or 2, or map",
    ):
        abstract_params(config, layout, "float32")


def test_heads_that_do_not_divide_are_told_with_what_would() -> None:
    layout = make_layout({"tensor": 1, "sequence": 1}, devices=jax.devices()[:1])

    class Mesh:
        shape = {"tensor": 1, "sequence": 8}

    object.__setattr__(layout, "mesh", Mesh())
    # Qwen2.5-7B: of its 28 heads, 7 use each of the 4 key-value heads.
    with pytest.raises(
        ValueError, match=r"heads = 28.*by 8, .*\('tensor', 'sequence'\); 1, 2, 4, 7"
    ):
        head_repeats(28, 4, layout)
    assert head_repeats(40, 8, layout) == 1
    assert head_repeats(16, 4, layout) == 2


def test_a_row_that_time_does_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny/r1_zero", ["stages.zero.length_bucket=20"])
    layout = make_layout({"data": 1, "sequence": 1}, devices=jax.devices()[:1])
    check_divided(config, Layouts(layout, layout))

    class Mesh:
        shape = {"data": 1, "sequence": 8}

    object.__setattr__(layout, "mesh", Mesh())
    monkeypatch.setattr("r1jax.run.resolve.process_batch_slice", lambda _: BatchSlice(0, 1))
    with pytest.raises(
        ValueError, match=r"stages.base.row_tokens = \d+ .* 8|length_bucket = 20 .* 8"
    ):
        check_divided(config, Layouts(layout, layout))
