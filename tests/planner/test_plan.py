"""Plans of runs: what fits, what a step takes, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forked
import jax
import pytest

from r1jax.commands.plan import with_given_shapes
from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.models import Decoder, ModelConfig
from r1jax.planner import estimate, hlo
from r1jax.planner.plan import (
    Case,
    PlanOptions,
    ProgramPlan,
    StagePlan,
    advice,
    parse_mesh,
    plan,
)
from r1jax.planner.topologies import Slice, find_slice
from r1jax.programs import Planning, SlotRollout
from r1jax.programs.lengths import CutLognormal
from r1jax.programs.program import expected_flops, forward_flops
from r1jax.run.chips import CHIPS, Chip, Torus
from r1jax.run.models import decoder_of as decoder_in
from r1jax.run.models import make_layouts
from r1jax.run.resolve import load_functions
from r1jax.settings.mesh import MeshSection
from r1jax.settings.sampling import SamplingSection
from r1jax.sharding import make_layout
from r1jax.stages.grpo.settings import GRPOStage

# A model of one layer: everything compiles in seconds.
SMALL = ["model.config.num_hidden_layers=1", "stages.zero.micro_batches=2"]


def run_plan(
    path: Path, *arguments: str
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    command = ["-m", "r1jax", "plan", *arguments, "--json", str(path)]
    if "--topology" in arguments:  # JAX looks for the TPU compiler as it is imported
        python = [sys.executable, *command]
        done = subprocess.run(python, capture_output=True, text=True, timeout=600)
    else:
        done = forked.run(*command)
    content = json.loads(path.read_text()) if path.exists() else {}
    return content, done


def test_the_tiny_config_on_fake_devices(tmp_path: Path) -> None:
    content, done = run_plan(
        *(tmp_path / "plan.json", "tiny/r1_zero", *SMALL, "--fake-devices", "2"),
        *("--only", "zero", "--mesh", "config", "--mesh", "data=3", "--measure"),
    )
    assert done.returncode == 0, done.stderr
    good, refused = content["plans"]
    assert (good["mesh"], good["fits"], good["devices"]) == ({"data": 2}, True, 2)
    assert "needs a multiple of 3 devices" in refused["refused"]
    (stage,) = good["stages"]
    programs = {program["name"]: program for program in stage["programs"]}
    assert list(programs) == ["prefill", "decode and refill", "log-probs", "update"]
    # 512 samples through 128 slots, 64 tokens each, of which a call decodes 32.
    calls = [program["calls"] for program in programs.values()]
    assert calls[1:] == [512 / 128 * 64 / 32, 1, 1]
    assert (stage["tokens"], stage["unit"]) == (32 * 16 * 64, "step")

    # By hand, in float32: 1 layer, hidden 96, inner 256, 4 + 2 x 2 heads of 24, 32 tokens tied.
    matrices = 96 * 96 + 2 * 96 * 48 + 96 * 96 + 3 * 96 * 256
    weights = 4 * (matrices + 32 * 96 + 3 * 96 + 2 * 48 + 96)
    update = programs["update"]
    assert update["memory"]["weights"] == update["memory"]["reference"] == weights
    assert update["memory"]["optimizer"] == 2 * weights + 2 * 4  # moments, and two counters
    assert update["total"] == sum(update["memory"].values())
    # Keys and values of a device's pages of 16 tokens: of 64 slots with 64 new tokens, which also
    # fill one each, and of 16 prompts.
    pages = 64 * (4 + 1) + 16 + 1
    cache = programs["decode and refill"]["memory"]["cache"]
    assert cache == pytest.approx(2 * 4 * 2 * 24 * 16 * pages, rel=0.02)
    # The update's products: 256 rows of 80 tokens a device; the scores cover the whole square, and
    # the last of a row's 80 logits is not needed, but 79 are padded to 80.
    forward = 256 * 80 * 2 * (matrices + 32 * 96 + 2 * 80 * 96)
    assert update["flops"] == pytest.approx(3 * forward, rel=0.05)
    # Gradients are summed over the devices, which share nothing else of note.
    ((kind, axes),) = {(row["kind"], tuple(row["axes"])) for row in update["exchange"]}
    assert (kind, axes) == ("all-reduce", ("data",))
    sent = sum(row["bytes"] for row in update["exchange"])
    # Those of ten micro-batches of 52 packed rows, if all are full; a tied table's come in two
    # parts, once each: not once a chunk of 16 logits.
    assert sent == pytest.approx(10 * (weights + 4 * 32 * 96), rel=0.01)
    assert update["times"] is None  # nobody knows how fast a fake device is
    # It ran, which says nothing of a slice; a step is the sum of its calls.
    measured = {name: program["measured"] for name, program in programs.items()}
    assert all(seconds > 0 for seconds in measured.values())
    total = sum(program["calls"] * program["measured"] for program in programs.values())
    assert stage["measured"] == pytest.approx(total)
    assert "no time to tell; measured: " in done.stdout and "data=3" not in done.stderr


def test_slots_and_lengths_on_fake_devices(tmp_path: Path) -> None:
    content, done = run_plan(
        *(tmp_path / "plan.json", "tiny/r1_zero", *SMALL, "--fake-devices", "8"),
        *("--only", "zero", "--mesh", "data=8", "--measure", "stages.zero.sampling.slots=64"),
        "stages.zero.lengths={mean: 20, p99: 60}",
    )
    assert done.returncode == 0, done.stderr
    (stage,) = content["plans"][0]["stages"]
    programs = {program["name"]: program for program in stage["programs"]}
    assert list(programs) == ["prefill", "decode and refill", "log-probs", "update"]
    # 32 questions x 16 samples; the limit of 64 tokens cuts little.
    assert 0.99 < stage["tokens"] / (512 * 20) < 1
    # A step of 64 slots: at least its tokens / 64 steps, in calls of 32.
    decode = programs["decode and refill"]
    assert stage["tokens"] / 64 / 32 < decode["calls"] < 1.5 * stage["tokens"] / 64 / 32
    # By hand: products of 8 slots with the weights, in a step of a device, and of their queries
    # with the current pages and a part of a chunk of 1,024 tokens.
    matrices = 96 * 96 + 2 * 96 * 48 + 96 * 96 + 3 * 96 * 256 + 32 * 96
    (chunks,) = re.findall(r"pages, ([\d.]+) chunks", done.stdout)
    attention = (float(chunks) * 1024 + 8 * 16) * 4 * (24 + 24)
    assert decode["flops"] == pytest.approx(32 * 2 * (8 * matrices + attention), rel=0.1)
    pages = 8 + 8 * 4 + 5  # current ones, those of samples, and those of prompts
    assert decode["memory"]["cache"] == pytest.approx(pages * 16 * 2 * 4 * 2 * 24, rel=0.05)
    assert decode["memory"]["log"] > 8 * 32 * (5 * 4 + 1)
    # Of the three micro-batches of 26 rows a device, two hold something.
    forward = 2 * 26 * 80 * 2 * (matrices + 2 * 80 * 96)
    assert programs["update"]["flops"] == pytest.approx(3 * forward, rel=0.05)
    assert all(program["measured"] > 0 for program in programs.values())
    assert stage["notes"][0].startswith("8 x 8 slots, 8 of which have pages at once; 8 x 37 pages")
    assert "an update runs 2 of 3 micro-batches of 208 rows" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
def test_a_tiny_model_is_compiled_for_a_slice(tmp_path: Path) -> None:
    content, done = run_plan(
        *(tmp_path / "plan.json", "tiny/r1_zero", *SMALL, "--topology", "v5e:2x2"),
        *("model.compute_dtype=bfloat16", "--only", "base", "--mesh", "fsdp"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the compiler's own noise stays hidden
    (found,) = content["plans"]
    assert (found["mesh"], found["devices"]) == ({"fsdp": 4, "data": 1}, 4)
    (update,) = found["stages"][0]["programs"]
    assert update["fits"] and update["total"] < found["hbm"]
    # The Pallas kernel was compiled, and its products are known; heads are padded to 128.
    assert update["unknown_kernels"] == []
    matrices = 96 * 96 + 2 * 96 * 48 + 96 * 96 + 3 * 96 * 256 + 32 * 96
    kernel = 2 * 4 * 128 * 128 * 128 * (2 + 3 + 4)
    assert update["flops"] == pytest.approx(8 * (6 * 128 * matrices + kernel), rel=0.1)
    assert {axis for row in update["exchange"] for axis in row["axes"]} == {"fsdp"}
    assert update["times"]["total"] > 0 and found["stages"][0]["tokens_per_second"] > 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
def test_slots_of_a_slice_read_pages_by_the_kernel(tmp_path: Path) -> None:
    """It is compiled for the chip; its work is that of the pages that are read, not of the pool."""
    content, done = run_plan(
        *(tmp_path / "plan.json", "tiny/r1_zero", *SMALL, "--topology", "v5e:2x2"),
        *("model.compute_dtype=bfloat16", "--only", "zero", "--mesh", "data=4"),
        *("stages.zero.sampling.slots=64", "stages.zero.lengths={mean: 20, p99: 60}"),
    )
    assert done.returncode == 0, done.stderr
    programs = {each["name"]: each for each in content["plans"][0]["stages"][0]["programs"]}
    decode = programs["decode and refill"]
    assert decode["fits"] and decode["unknown_kernels"] == []
    (read,) = re.findall(r"a step reads ([\d.,]+) pages", done.stdout)
    # Of 4 devices each has 16 slots; heads of 24 are padded to 16 rows of queries.
    matrices = 96 * 96 + 2 * 96 * 48 + 96 * 96 + 3 * 96 * 256 + 32 * 96
    kernel = float(read.replace(",", "")) * 2 * 16 * 2 * 64 * 24 * 2
    current = 16 * 4 * 64 * 24 * 2 * 2
    assert decode["flops"] == pytest.approx(32 * (2 * 16 * matrices + kernel + current), rel=0.2)


# --- Slices --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device that knows no more than its place."""

    coords: tuple[int, ...]
    platform: str = "tpu"
    device_kind: str = "none of those with an order of their own"
    core_on_chip: int = 0
    process_index: int = 0
    slice_index: int = 0


def cube(shape: tuple[int, ...], chip: Chip) -> Slice:
    """A slice of that many chips along each axis."""
    places: list[tuple[int, ...]] = [()]
    for size in shape:
        places = [(*place, i) for place in places for i in range(size)]
    devices: Any = tuple(Device(place) for place in places)
    return Slice("cube", devices, chip)


def test_links_of_rings_lines_and_planes() -> None:
    torus = cube((4, 4, 8), CHIPS["v5p"])
    along_z, along_y = range(8), range(0, 32, 8)
    assert torus.shape == (4, 4, 8)
    assert torus.links(along_z) == torus.links(along_y) == 2  # rings, used both ways
    assert torus.links(range(4)) == 1  # half of a ring is a line
    assert torus.links(range(128)) == 6
    # An axis of 4 chips is no ring on v5e, one of 16 is.
    assert cube((4, 16), CHIPS["v5e"]).links(range(16)) == 2
    assert cube((4, 16), CHIPS["v5e"]).links(range(0, 64, 16)) == 1


def test_a_roofline_by_hand() -> None:
    chip = Chip("tpu", hbm=1, flops=100, hbm_bandwidth=10, network=Torus(2, 1, 4))
    four = cube((4,), chip)
    operations = (hlo.Operation(200, 10, 3), hlo.Operation(0, 50, 1))
    gather = hlo.Collective("all-gather", 8, (0, 1, 2, 3), 5)
    found = estimate.times(hlo.Cost(operations, (gather,)), four)
    assert found is not None
    assert (found.compute, found.memory, found.network) == (6, 8, 10)
    # 3 x max(2, 1) + max(0, 5) on the chip; 5 x 8 bytes over two links of 2 beside it.
    assert (found.total, found.bound) == (11, "network")
    (row,) = estimate.traffic(hlo.Cost((), (gather, gather)), four, {"fsdp": 4})
    assert (row.kind, row.axes, row.count, row.bytes) == ("all-gather", ("fsdp",), 10, 80)


def test_products_of_a_forward_pass_by_hand() -> None:
    config = ModelConfig("llama", 10, 4, 6, 2, 2, 1, 2)
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6
    vectors = 2 * (2 * 4) + 4
    # 3 rows of 5 tokens after 2: tokens see 3, 4, 5, 6 and 7.
    attention = 2 * (2 * 2) * 25
    expected = 2 * 3 * (5 * (2 * layer + 4 * 10 + vectors) + 2 * attention)
    assert forward_flops(config, 3, 5, 2) == pytest.approx(expected)


def test_products_of_lengths_are_the_mean_of_their_products() -> None:
    config = ModelConfig("llama", 10, 4, 6, 2, 2, 1, 2)
    lengths = CutLognormal.of(30, 90, 64)
    sampled = lengths.sample(2000)
    for start, before in ((0, 0), (7, 0), (0, 5)):
        by_length = [forward_flops(config, 1, before + n, start) for n in sampled]
        found = expected_flops(config, 4, lengths, start=start, before=before)
        assert found == pytest.approx(4 * sum(by_length) / len(by_length), rel=0.01)


def test_a_slice_that_is_too_small_says_by_how_much() -> None:
    gib = 2**30
    memory = {"weights": 4.0 * gib, "activations": 20.0 * gib, "padding": 0.5 * gib}
    program = ProgramPlan("update", 1, memory, False)
    stage = StagePlan("rl", "grpo", "step", 1, (program,), None, None, None)
    told = advice(program, stage, 16.0 * gib, 8)
    assert "rl: update is 8.5 GiB a device too large; its activations are 20 GiB" in told
    assert "micro_batches" in told and "about 13 such devices instead of 8" in told
    assert told.index("model.remat") < told.index("param_dtype")  # the largest part first


# --- What is refused -----------------------------------------------------------------------------


def test_what_crosses_slices_waits_for_the_network_between_them() -> None:
    one = cube((2, 2), CHIPS["v6e"])
    two: Any = [replace(device, slice_index=n) for n in (0, 1) for device in one.devices]
    both = replace(one, devices=tuple(two))
    assert both.bandwidth([0, 1]) == one.bandwidth([0, 1]) == 100e9
    assert both.bandwidth([0, 4]) == 12.5e9


def test_the_outer_axis_crosses_slices() -> None:
    one = cube((2, 2, 1), CHIPS["v6e"])
    two: Any = [replace(device, slice_index=n) for n in (0, 1) for device in one.devices]
    mesh = make_layout({"data": 1, "fsdp": 4, "tensor": -1}, devices=two).mesh
    assert [[d.slice_index for d in row] for row in mesh.devices[0]] == [[0, 0]] * 2 + [[1, 1]] * 2
    with pytest.raises(ValueError, match="mesh.axes.data = 3: the outermost .* crosses the 2 sl"):
        make_layout({"data": 3, "fsdp": -1}, devices=[*two, *two[:4]])


def test_meshes_of_the_command_line() -> None:
    own = MeshSection(axes={"data": 1, "fsdp": -1, "tensor": 2})
    assert parse_mesh("config", own) == own
    assert parse_mesh("fsdp", own).axes == {"fsdp": -1, "data": 1, "tensor": 1}
    assert parse_mesh("fsdp=2,tensor", own).axes == {"fsdp": 2, "tensor": -1, "data": 1}
    for text, reason in (
        ("fsdp=x", "'fsdp=x' is no axis"),
        ("=4", "is no axis"),
        ("fsdp,tensor", "which one axis may be"),
        ("fsdp=0", "a size is at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_mesh(text, own)


def one_device() -> Slice:
    return Slice("one", tuple(jax.devices()[:1]), None)


def test_what_does_not_go_together_is_refused_before_compiling() -> None:
    config = load_config("tiny/r1_zero")
    with pytest.raises(ValueError, match="needs a multiple of 2 devices"):
        plan(Case(config, one_device(), MeshSection(axes={"data": 2})))
    with pytest.raises(ValueError, match=r"--only zeros: no such stage; did you mean zero\?"):
        case = Case(config, one_device(), MeshSection(axes={"data": 1}))
        plan(case, PlanOptions(stages=["zeros"]))
    many: Any = cube((3, 1, 1), CHIPS["v5p"]).devices
    three = Slice("three", many, None)
    with pytest.raises(ValueError, match="is not a multiple of 3, the mesh's split of the batch"):
        plan(Case(config, three, MeshSection(axes={"data": 3})))
    with pytest.raises(ValueError, match="mesh axis 'pipeline' has 3 devices and splits nothing"):
        plan(Case(config, three, MeshSection(axes={"pipeline": 3})))


def named(config: RunConfig, stage: str) -> dict[str, float]:
    """Program -> calls, of one stage on one device; nothing is compiled."""
    target = one_device()
    layout, sampling = make_layouts(config.mesh, target.devices)

    def decoder_of(_: str) -> Decoder:
        shape = ModelConfig.from_hugging_face(config.model.config or {})
        return decoder_in(config.model, shape, layout)

    planning = Planning(config, decoder_of, sampling)
    found = load_functions(config.stage(stage)).programs(config.stage(stage), planning)
    return {program.name: program.calls for program in found.programs}


def test_evaluations_within_a_stage_and_rewriting_models_are_planned() -> None:
    rollout = ["prefill", "decode and refill"]
    held_out = "stages.zero.held_out=held_out"
    config = load_config("tiny/r1_zero", [held_out])
    programs = named(config, "zero")
    assert list(programs)[:4] == [*rollout, *(f"held-out {name}" for name in rollout)]
    assert programs["held-out decode and refill"] == 0 and programs["decode and refill"] > 0

    rewrite = "stages.cold_start.rewrite={kind: model, weights: zero, max_new_tokens: 256}"
    programs = named(load_config("tiny/r1", [rewrite]), "cold_start")
    assert list(programs) == [*rollout, *(f"rewrite: {name}" for name in rollout)]
    assert not any(programs[name] for name in programs if name.startswith("rewrite"))


def test_what_is_not_there_cannot_be_measured() -> None:
    done = forked.run("-m", "r1jax", "plan", "tiny/r1_zero", "--measure", "--slice", "v5e:2x2")
    assert done.returncode == 2 and "--measure needs devices that are there" in done.stderr


def test_a_model_without_a_shape_is_refused_with_what_to_give() -> None:
    config = load_config("tiny/r1_zero", ["model.config=null", "model.path=nobody/nothing"])
    with pytest.raises(ValueError, match=r"nobody/nothing.*Give its shape.*'model.config=\{model_"):
        plan(Case(config, one_device(), MeshSection(axes={"data": 1})))


def test_a_given_shape_takes_the_place_of_a_path() -> None:
    shape = "{model_type: llama, hidden_size: 8}"
    config = load_config("qwen2.5-1.5b/r1", with_given_shapes([f"model.config={shape}", "seed=3"]))
    assert config.model.path is None and config.seed == 3
    assert config.model.config == {"model_type": "llama", "hidden_size": 8}
    # A single value within a shape that the config has is no new shape.
    small = "model.config.num_hidden_layers=1"
    assert with_given_shapes([small]) == [small]


def test_slices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("v9:4x4", "v5p", "v5p:4x"):
        with pytest.raises(ValueError, match=f"{name}: no such slice.*v5p:4x4x4"):
            find_slice(name)
    with pytest.raises(ValueError, match="has 3 dimensions, such as v5p:4x4x4"):
        find_slice("v5p:4x4")
    with pytest.raises(ValueError, match="between slices of v4 is not known.*v5e, v5p, v6e is"):
        find_slice("2xv4:2x2x2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'r1jax\[tpu\]'"):
        find_slice("v5p:4x4x4")


def test_speculative_rollouts_are_planned_with_the_caches_that_they_have() -> None:
    config = load_config(
        "tiny/r1_zero",
        [
            "model.config.num_nextn_predict_layers=1",
            "model.multi_token_prediction=true",
            "stages.zero.sampling.speculative=true",
        ],
    )
    layout, _ = make_layouts(config.mesh, one_device().devices)
    shape = ModelConfig.from_hugging_face(config.model.config or {})
    stage = config.stage("zero")
    assert isinstance(stage, GRPOStage)
    model = decoder_in(config.model, shape, layout)
    lengths = CutLognormal.equal(200)
    rollout, plain = (
        SlotRollout(model, 2, 2, 8, 200, sampling, lengths)
        for sampling in (stage.sampling, SamplingSection())
    )
    # Two entries for each token, where no draft stays, and those of one more layer.
    assert rollout.shape.sample_pages == 2 * plain.shape.sample_pages - 1 == 25
    pages = rollout.shape.slots * 26 + rollout.shape.prompts + 1
    values = sum(leaf.size for leaf in jax.tree.leaves(rollout.state.cache))
    layers = shape.num_hidden_layers + 1
    width = 2 * shape.num_key_value_heads * shape.head_dim
    assert values == pages * 16 * (layers * width + 1) + pages - rollout.shape.slots
