"""Plans for GPUs: their names, links and kernels; what their compiler says of a small model."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from r1jax.config.load import load_config
from r1jax.models import ModelConfig
from r1jax.models.remat import remat_policy
from r1jax.planner import estimate, hlo
from r1jax.planner.topologies import Slice, find_slice, is_slice, stand_ins
from r1jax.run.chips import CHIPS, Chip, Efficiency, Switch
from r1jax.run.models import decoder_of, make_layouts
from r1jax.sharding import StandIn

SHAPE = Path(__file__).parents[2] / "configs/models/Qwen/Qwen2.5-Math-1.5B.json"

needs_compiler = pytest.mark.skipif(
    all(importlib.util.find_spec(f"jax_cuda{n}_plugin") is None for n in (12, 13)),
    reason="needs the GPU compiler: `make .cuda/installed` gets it; then PYTHONPATH=.cuda",
)


@dataclass(frozen=True)
class Device:
    """A device that knows no more than its host."""

    process_index: int = 0


def hosts(count: int, of_each: int, chip: Chip) -> Slice:
    devices: Any = tuple(Device(host) for host in range(count) for _ in range(of_each))
    return Slice("hosts", devices, chip)


def test_names_of_hosts() -> None:
    assert all(map(is_slice, ("h100:1", "h200:8", "4xh200:8")))
    for name in ("h200:9", "h200:2x4", "h200:0"):
        assert not is_slice(name)
        with pytest.raises(
            ValueError, match=f"{name}: a host has up to 8 H200, such as h200:8; 2x"
        ):
            find_slice(name)
    assert stand_ins("h200:1").stands_for == StandIn("gpu", 1, int(CHIPS["h200"].hbm))


def test_a_command_takes_most_of_a_gpu_unless_the_environment_says_otherwise() -> None:
    variable = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    code = (
        "import atexit, os, runpy, sys\n"
        "sys.argv = ['r1jax', '--help']\n"
        f"atexit.register(lambda: print(os.environ[{variable!r}]))\n"
        "runpy.run_module('r1jax', run_name='__main__', alter_sys=True)"
    )
    for given, expected in ({}, "0.9"), ({variable: "0.5"}, "0.5"):
        environment = {k: v for k, v in os.environ.items() if k != variable} | given
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert done.stdout.decode().splitlines()[-1] == expected


def test_what_the_backward_pass_keeps_is_decided_by_the_memory_of_the_gpu() -> None:
    """A model whose activations fit an H200; their memory is not that of this machine."""
    config = load_config("qwen2.5-1.5b/r1_zero_gsm8k")
    shape = ModelConfig.from_hugging_face(json.loads(SHAPE.read_text()))
    target = stand_ins("h200:1")
    layouts = make_layouts(config.mesh, target.devices, target.stands_for)
    decoder = decoder_of(config.model, shape, layouts.training)
    assert config.model.remat == "auto"
    assert decoder.execution.device_memory == int(0.9 * 143_771 * 2**20)
    assert [remat_policy(decoder, rows, 2048) for rows in (4, 64)] == ["dots", "full"]


def test_a_device_sends_by_nvlink_inside_a_host_and_by_its_adapter_between_hosts() -> None:
    chip = Chip("gpu", 1, 1, 1, Switch(450e9, 8), between_slices=50e9)
    four = hosts(4, 8, chip)
    assert four.bandwidth(range(8)) == 450e9
    assert four.bandwidth((0, 8, 16, 24)) == 50e9
    # A ring over two devices of each host leaves it by two adapters; over all, NVLink is slower.
    assert four.bandwidth((0, 1, 8, 9)) == 100e9
    assert (
        hosts(2, 8, Chip("gpu", 1, 1, 1, Switch(300e9, 8), between_slices=50e9)).bandwidth(
            range(16)
        )
        == 300e9
    )
    # Of 15 parts that a device sends to others, 8 leave its host.
    assert four.bandwidth(range(16), "all-to-all") == pytest.approx(50e9 * 15 / 8)


def test_measured_efficiency_by_hand() -> None:
    reached = Efficiency(0.5, 0.8, 2.0, (("mha", 0.25),), "a card")
    one = hosts(1, 1, Chip("gpu", 1, 100, 10, Switch(1, 8), efficiency=reached))
    operations = (
        hlo.Operation(200, 10, 3),  # 200 / 50 = 4 s
        hlo.Operation(0, 80, 1),  # 80 / 8 = 10 s
        hlo.Operation(100, 0, 2, "mha_forward"),  # 100 / 25 = 4 s
        hlo.Operation(1, 1, 5),  # as long as a kernel takes
    )
    found = estimate.times(hlo.Cost(operations, ()), one)
    assert found is not None
    assert found.total == pytest.approx(3 * 4 + 10 + 2 * 4 + 5 * 2)
    assert found.compute == pytest.approx(3 * 4 + 2 * 4 + 5 / 50)


def test_estimates_are_near_what_was_measured_on_a_card(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Updates within a tenth, a decoded token within a fifth; and the documents' table is that."""
    root = Path(__file__).parents[2]
    script = runpy.run_path(str(root / "benchmarks" / "gpu_estimates.py"))
    found = script["estimates"]()
    assert len(found) == 6
    for program, estimated, measured in found:
        near = 0.1 if program.startswith("update") else 0.2
        assert estimated == pytest.approx(measured, rel=near), program
    script["main"]()
    assert capsys.readouterr().out in (root / "docs" / "speed.md").read_text()


def test_products_of_attention_kernels_on_gpu() -> None:
    """Of the blocks on and below the diagonal: scores and values; backward five, or seven."""
    x, target = "bf16[2,256,3,64]", 'custom_call_target="__gpu$xla.gpu.triton"'
    text = f"""HloModule jit_f, num_partitions=1

ENTRY %main (q: {x}, k: {x}, v: {x}, ids: s32[2,256]) -> {x} {{
  %q = {x}{{3,2,1,0}} parameter(0)
  %k = {x}{{3,2,1,0}} parameter(1)
  %v = {x}{{3,2,1,0}} parameter(2)
  %ids = s32[2,256]{{1,0}} parameter(3)
  ROOT %pallas_call.7 = {x}{{3,2,1,0}} custom-call(%q, %k, %v, %ids), {target}, NAME
}}
"""
    pairs = 2 * 3 * 256 * 256 * 3 / 4  # two blocks of 128: three of four
    for kernel, products in ("mha_forward", 2), ("mha_backward", 7), ("mha_preprocess_backward", 0):
        path = f'metadata={{op_name="jit(step)/jit(mha)/{kernel}/pallas_call"}}'
        found = hlo.cost(hlo.parse(text.replace("NAME", path)))
        assert found.flops == 2 * products * pairs * 64 and not found.unknown
        assert [each.kernel for each in found.operations] == [kernel]
        assert found.bytes == 4 * 2 * 256 * 3 * 64 * 2 + 2 * 256 * 4
    for direction, products in ("", 2), ("Backward", 5):
        call = f'custom_call_target="__cudnn$fmhaSoftmax{direction}"'
        found = hlo.cost(hlo.parse(text.replace(target, call).replace("NAME", "x=1")))
        assert found.flops == 2 * products * pairs * 64 and not found.unknown
    # Two key heads for the three of queries, values of 32: scores, gradients of keys; values.
    text = text.replace(f"%k = {x}", "%k = bf16[2,256,2,64]")
    text = text.replace(f"%v = {x}", "%v = bf16[2,256,2,32]")
    for kernel, widths in ("", 64 + 32), ("_dq", 2 * 64 + 32), ("_dkv", 2 * 64 + 2 * 32):
        path = f'metadata={{op_name="jit(step)/flash_attention{kernel}/pallas_call"}}'
        found = hlo.cost(hlo.parse(text.replace("NAME", path)))
        assert found.flops == 2 * widths * pairs and not found.unknown
    other = 'metadata={op_name="jit(step)/another/pallas_call"}'
    assert hlo.cost(hlo.parse(text.replace("NAME", other))).unknown == ("another",)


@needs_compiler
@pytest.mark.parametrize("name", ["h200:2", "2xh100:1"])
def test_a_slice_of_gpus_is_compiled_for(name: str, tmp_path: Path) -> None:
    """By hand: products of a tiny model; weights and gradients travel over the mesh's axis."""
    path = tmp_path / "plan.json"
    command = ["plan", "tiny/r1_zero", "--topology", name, "--only", "base", "--mesh", "fsdp"]
    settings = ["model.config.num_hidden_layers=1", "model.compute_dtype=bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "r1jax", *command, *settings, "--quick", "--json", str(path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    # As JAX is imported, the plug-in says that there is no driver; the compiler says nothing.
    said = ("absl::InitializeLog()", "Could not find cuda drivers")
    assert all(any(text in line for text in said) for line in done.stderr.splitlines())
    (found,) = json.loads(path.read_text())["plans"]
    kind, sends = ("h100", 50e9) if name.startswith("2x") else ("h200", 450e9)
    assert (found["mesh"], found["hbm"]) == ({"fsdp": 2, "data": 1}, CHIPS[kind].hbm)
    (update,) = found["stages"][0]["programs"]
    assert update["fits"] and update["unknown_kernels"] == []
    matrices = 96 * 96 + 2 * 96 * 48 + 96 * 96 + 3 * 96 * 256 + 32 * 96
    attention = 2 * 4 * 128 * 128 * 24 * (2 + 7)
    expected = 16 * (6 * 128 * matrices + attention)
    assert update["flops"] == pytest.approx(expected, rel=0.1)
    # Weights are gathered and gradients summed over the link that joins the two.
    (axes,) = {tuple(row["axes"]) for row in update["exchange"]}
    assert axes == ("fsdp",)
    sent = sum(row["bytes"] for row in update["exchange"])
    assert update["times"]["network"] == pytest.approx(sent / sends)
    assert 4 * matrices < sent < 30 * matrices
