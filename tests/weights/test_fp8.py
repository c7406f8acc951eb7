"""DeepSeek's block-quantised fp8: numbers by hand, references, round trips, meshes, the release."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from deepseek_models import PUBLISHED
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from r1jax.models import ModelConfig, abstract_params, declare
from r1jax.models.parameters import Params, is_spec
from r1jax.recipe import export_run
from r1jax.sharding import single_device
from r1jax.weights.hugging_face import (
    Tensors,
    convert,
    dequantise,
    export,
    is_quantised,
    load_params,
    quantise,
    read_config,
    stored_shapes,
)
from r1jax.weights.hugging_face.exporting import _stored_weights
from r1jax.weights.hugging_face.fp8 import (
    QUANTIZATION_CONFIG,
    is_quantised_matrix,
    read_values,
    scale_name,
)
from r1jax.weights.hugging_face.tensor_files import TensorType

FLOAT8 = ml_dtypes.float8_e4m3fn
# The 163 files of DeepSeek-R1 (and V3), as listed by their headers: 91,991 tensors.
RELEASED = """
model.embed_tokens.weight                                      BF16     129280 7168
model.layers.0-61.input_layernorm.weight                       BF16     7168
model.layers.0-61.post_attention_layernorm.weight              BF16     7168
model.layers.0-61.self_attn.q_a_proj.weight                    F8_E4M3  1536 7168
model.layers.0-61.self_attn.q_a_proj.weight_scale_inv          F32      12 56
model.layers.0-61.self_attn.q_a_layernorm.weight               BF16     1536
model.layers.0-61.self_attn.q_b_proj.weight                    F8_E4M3  24576 1536
model.layers.0-61.self_attn.q_b_proj.weight_scale_inv          F32      192 12
model.layers.0-61.self_attn.kv_a_proj_with_mqa.weight          F8_E4M3  576 7168
model.layers.0-61.self_attn.kv_a_proj_with_mqa.weight_scale_inv  F32    5 56
model.layers.0-61.self_attn.kv_a_layernorm.weight              BF16     512
model.layers.0-61.self_attn.kv_b_proj.weight                   F8_E4M3  32768 512
model.layers.0-61.self_attn.kv_b_proj.weight_scale_inv         F32      256 4
model.layers.0-61.self_attn.o_proj.weight                      F8_E4M3  7168 16384
model.layers.0-61.self_attn.o_proj.weight_scale_inv            F32      56 128
model.layers.0-2.mlp.gate_proj.weight                          F8_E4M3  18432 7168
model.layers.0-2.mlp.gate_proj.weight_scale_inv                F32      144 56
model.layers.0-2.mlp.up_proj.weight                            F8_E4M3  18432 7168
model.layers.0-2.mlp.up_proj.weight_scale_inv                  F32      144 56
model.layers.0-2.mlp.down_proj.weight                          F8_E4M3  7168 18432
model.layers.0-2.mlp.down_proj.weight_scale_inv                F32      56 144
model.layers.3-61.mlp.gate.weight                              BF16     256 7168
model.layers.3-61.mlp.gate.e_score_correction_bias             F32      256
model.layers.3-61.mlp.experts.0-255.gate_proj.weight           F8_E4M3  2048 7168
model.layers.3-61.mlp.experts.0-255.gate_proj.weight_scale_inv  F32     16 56
model.layers.3-61.mlp.experts.0-255.up_proj.weight             F8_E4M3  2048 7168
model.layers.3-61.mlp.experts.0-255.up_proj.weight_scale_inv   F32      16 56
model.layers.3-61.mlp.experts.0-255.down_proj.weight           F8_E4M3  7168 2048
model.layers.3-61.mlp.experts.0-255.down_proj.weight_scale_inv  F32     56 16
model.layers.3-61.mlp.shared_experts.gate_proj.weight          F8_E4M3  2048 7168
model.layers.3-61.mlp.shared_experts.gate_proj.weight_scale_inv  F32    16 56
model.layers.3-61.mlp.shared_experts.up_proj.weight            F8_E4M3  2048 7168
model.layers.3-61.mlp.shared_experts.up_proj.weight_scale_inv  F32      16 56
model.layers.3-61.mlp.shared_experts.down_proj.weight          F8_E4M3  7168 2048
model.layers.3-61.mlp.shared_experts.down_proj.weight_scale_inv  F32    56 16
model.layers.61.embed_tokens.weight                            BF16     129280 7168
model.layers.61.enorm.weight                                   BF16     7168
model.layers.61.hnorm.weight                                   BF16     7168
model.layers.61.eh_proj.weight                                 BF16     7168 14336
model.layers.61.shared_head.norm.weight                        BF16     7168
model.layers.61.shared_head.head.weight                        BF16     129280 7168
model.norm.weight                                              BF16     7168
lm_head.weight                                                 BF16     129280 7168
"""
# Every branch of a checkpoint, with partial blocks along either dimension and along both.
TINY = ModelConfig.from_hugging_face(
    PUBLISHED
    | dict(
        vocab_size=24,
        hidden_size=144,
        intermediate_size=160,
        moe_intermediate_size=136,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=40,
        kv_lora_rank=128,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        num_nextn_predict_layers=1,
    )
)


def released() -> dict[str, TensorType]:
    """RELEASED without its ranges."""

    def expand(name: str) -> Iterator[str]:
        ranges = [range(int(a), int(b) + 1) for a, b in re.findall(r"(\d+)-(\d+)", name)]
        template = re.sub(r"\d+-\d+", "{}", name)
        return (template.format(*numbers) for numbers in itertools.product(*ranges))

    return {
        full: TensorType(tuple(int(size) for size in shape), code)
        for name, code, *shape in (line.split() for line in RELEASED.strip().splitlines())
        for full in expand(name)
    }


def test_the_released_checkpoint_is_what_is_read_and_written() -> None:
    types = released()
    assert len(types) == 91_991
    assert sum(math.prod(type.shape) for type in types.values()) == 684_531_386_000  # with scales
    raw = PUBLISHED | {"num_nextn_predict_layers": 1, "quantization_config": QUANTIZATION_CONFIG}
    assert is_quantised(raw)
    model = ModelConfig.from_hugging_face(raw)
    expected = stored_shapes(declare(model), lambda name: types[name].code == "F8_E4M3")
    assert expected == {name: type.shape for name, type in types.items()}
    params = abstract_params(model, single_device(), jnp.bfloat16)
    written = _stored_weights(params, model, "fp8")
    assert {name: type for weight in written for name, type in weight.tensors.items()} == types


# One matrix


def test_a_block_worked_out_by_hand() -> None:
    values = np.float32([[1, -2, 0.5, 0.3], [7, 0, 3.5, 2.0**-15]])
    codes, scales = quantise(values)
    assert scales.tolist() == [[7 / 448]]  # 1/64, and so the codes are of 64, -128, 32, 19.2, ...
    # Sign, 4 bits of the exponent + 7, 3 of the fraction. 19.2 lies between 18 and 20 = 1.25 * 16;
    # 2^-9 is the smallest number.
    assert codes.view(np.uint8).tolist() == [[0x68, 0xF0, 0x60, 0x5A], [0x7E, 0x00, 0x76, 0x01]]
    expected = [[1, -2, 0.5, 20 / 64], [7, 0, 3.5, 2.0**-15]]
    assert dequantise(codes, scales).tolist() == expected


def test_partial_blocks_have_scales_of_their_own() -> None:
    """130 x 200: four blocks, of 128 x 128, 128 x 72, 2 x 128 and 2 x 72."""
    values = np.ones((130, 200), np.float32)
    values[127, 127], values[127, 128], values[128, 127], values[129, 199] = 448, -896, 1344, 1792
    codes, scales = quantise(values)
    assert scales.tolist() == [[1, 2], [3, 4]]
    back = dequantise(codes, scales)
    largest = [back[127, 127], back[127, 128], back[128, 127], back[129, 199]]
    assert largest == [448, -896, 1344, 1792]
    assert back[0, 0] == back[0, 199] == 1
    assert back[129, 0] == np.float32(3 * 0.34375)  # 1/3, to four bits
    assert back[129, 198] == 1


def numbers_of(codes: np.ndarray) -> np.ndarray:
    """Codes read bit by bit (OCP 8-bit floating point, E4M3)."""
    bits = codes.view(np.uint8).astype(np.int64)
    sign, exponent, fraction = bits >> 7, bits >> 3 & 15, bits & 7
    normal = (8 + fraction) * 2.0 ** (exponent - 10)
    size = np.where(exponent > 0, normal, fraction * 2.0**-9)
    return np.where(bits & 127 == 127, np.nan, np.where(sign, -size, size))


def test_values_agree_with_other_implementations() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (300, 200), np.uint8).view(FLOAT8)
    assert len(np.unique(codes.view(np.uint8))) == 256
    scales = rng.uniform(1e-4, 3, (3, 2)).astype(np.float32)
    wide = np.kron(scales, np.ones((128, 128), np.float32))[:300, :200]
    values = dequantise(codes, scales)
    np.testing.assert_array_equal(values, numbers_of(codes).astype(np.float32) * wide)
    theirs = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(values, (theirs.float() * torch.from_numpy(wide)).numpy())
    # transformers' own, which takes whole blocks only.
    parts = {"weight": theirs[:256, :128], "weight_scale_inv": torch.from_numpy(scales[:2, :1])}
    (found,) = Fp8Dequantize(None).convert(parts).values()
    np.testing.assert_array_equal(values[:256, :128], found.numpy())


def test_codes_agree_with_torch_and_are_the_nearest() -> None:
    values = np.random.default_rng(0).standard_normal((150, 130)).astype(np.float32)
    codes, scales = quantise(values)
    wide = np.kron(scales, np.ones((128, 128), np.float32))[:150, :130]
    theirs = (torch.from_numpy(values) / torch.from_numpy(wide)).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(codes.view(np.uint8), theirs.view(torch.uint8).numpy())
    # Four bits: half of the last is a 16th; and half of the smallest number.
    error = np.abs(dequantise(codes, scales) - values)
    assert np.all(error <= np.maximum(np.abs(values) / 16, wide * 2.0**-10) * 1.0001)


def test_blocks_without_size_are_zeros() -> None:
    values = np.zeros((128, 256), np.float32)
    values[:, 128:] = np.finfo(np.float32).smallest_subnormal
    codes, scales = quantise(values)
    assert np.all(scales > 0) and np.all(np.isfinite(scales))
    assert np.all(dequantise(codes, scales) == 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_survive_and_scales_where_their_products_are_exact(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    shape = data.draw(st.sampled_from([(130, 200), (128, 128), (7, 300)]))
    original, scales = quantise(rng.standard_normal(shape).astype(np.float32))
    short = rng.integers(2**20, 2**21, scales.shape).astype(np.float32) * np.float32(2.0**-34)
    for each, exact in ((short, True), (scales, False)):
        values = dequantise(original, each)
        codes, found = quantise(values)
        assert codes.tobytes() == original.tobytes()
        apart = np.abs(found.view(np.int32) - each.view(np.int32))
        assert apart.max() <= (0 if exact else 1)
        rounded = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        codes, found = quantise(rounded)
        assert codes.tobytes() == original.tobytes()
        # And what was rounded to bfloat16 once is as it is.
        again = dequantise(codes, found).astype(ml_dtypes.bfloat16).astype(np.float32)
        assert [x.tobytes() for x in quantise(again)] == [codes.tobytes(), found.tobytes()]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_box_takes_its_part_of_the_scales(data: st.DataObject) -> None:
    box = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
        for size in (300, 260)
    )
    np.testing.assert_array_equal(read_values(STORED, "w", box), WHOLE[box])


class Stored:
    """A matrix in fp8, as `Tensors` has it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        codes, scales = quantise(rng.standard_normal((300, 260)).astype(np.float32))
        scales *= rng.uniform(1, 9, scales.shape).astype(np.float32)
        self._parts = {"w": codes, "w_scale_inv": scales}
        self.types = {name: TensorType(part.shape, "") for name, part in self._parts.items()}

    def read(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        return self._parts[name][box]


STORED: Any = Stored()
WHOLE = dequantise(STORED.read("w", ()), STORED.read("w_scale_inv", ()))


# Directories


def random_params(config: ModelConfig = TINY) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.standard_normal(spec.shape).astype(np.float32)),
        declare(config),
        is_leaf=is_spec,
    )


@pytest.fixture(scope="module")
def in_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, as DeepSeek-V3 is released."""
    directory = tmp_path_factory.mktemp("fp8") / "model"
    export(directory, random_params(), TINY, dtype="fp8", max_shard_bytes=1 << 20)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def load(directory: Path, dtype: Any = jnp.float32) -> Params:
    return load_params(directory, TINY, single_device(), dtype)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, as torch reads them."""
    return {
        name: value
        for file in directory.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_an_export_has_the_released_layout(in_fp8: Path) -> None:
    config = read_config(in_fp8)
    assert config["quantization_config"] == QUANTIZATION_CONFIG
    assert config["torch_dtype"] == "bfloat16"
    assert ModelConfig.from_hugging_face(config) == TINY
    found = tensors_of(in_fp8)
    shapes = stored_shapes(declare(TINY), is_quantised_matrix)
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    for name, value in found.items():
        if name.endswith(("_scale_inv", "e_score_correction_bias")):
            assert value.dtype == torch.float32, name
        elif scale_name(name) in found:
            assert value.dtype == torch.float8_e4m3fn, name
        else:
            assert value.dtype == torch.bfloat16, name
    index = json.loads((in_fp8 / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == found.keys()
    for name, file in index.items():
        assert index.get(scale_name(name), file) == file  # engines look for it there


def test_weights_are_read_as_a_reference_reads_them(in_fp8: Path) -> None:
    """Each tensor's values by torch, in the place that a bfloat16 directory would give them."""
    tensors = tensors_of(in_fp8)
    plain = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if (scales := tensors.get(scale_name(name))) is not None:
            wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            value = value.float() * wide[: value.shape[0], : value.shape[1]]
        plain[name] = value.float().contiguous()
    other = in_fp8.parent / "plain"
    other.mkdir()
    save_file(plain, other / "model.safetensors")
    config = {k: v for k, v in read_config(in_fp8).items() if k != "quantization_config"}
    (other / "config.json").write_text(json.dumps(config))
    for dtype in (jnp.float32, jnp.bfloat16):
        jax.tree.map(np.testing.assert_array_equal, load(in_fp8, dtype), load(other, dtype))


def test_round_trips(in_fp8: Path, tmp_path: Path) -> None:
    before = tensors_of(in_fp8)
    for dtype in (jnp.float32, jnp.bfloat16):
        params = load(in_fp8, dtype)
        export(tmp_path / "fp8", params, TINY, dtype="fp8")
        after = tensors_of(tmp_path / "fp8")
        assert after.keys() == before.keys()
        for name, value in before.items():
            if not name.endswith("_scale_inv"):
                assert bytes_of(after[name]) == bytes_of(value), name
            else:
                rounding = 2.0**-23 if dtype == jnp.float32 else 2.0**-8
                np.testing.assert_allclose(after[name], value, rtol=rounding, err_msg=name)

        export(tmp_path / "bf16", params, TINY, dtype=jnp.bfloat16)
        assert "quantization_config" not in read_config(tmp_path / "bf16")
        assert not any(name.endswith("_scale_inv") for name in tensors_of(tmp_path / "bf16"))
        again = load(tmp_path / "bf16", jnp.bfloat16)
        jax.tree.map(np.testing.assert_array_equal, again, load(in_fp8, jnp.bfloat16))


def test_a_directory_is_converted_as_its_weights_are_exported(in_fp8: Path, tmp_path: Path) -> None:
    params = load(in_fp8)
    (tmp_path / "f32").mkdir()
    export(tmp_path / "f32", params, TINY)
    (tmp_path / "f32" / "tokenizer.json").write_text("{}")
    for dtype in (jnp.bfloat16, "fp8"):
        export(tmp_path / "exported", params, TINY, dtype=dtype)
        convert(tmp_path / "f32", tmp_path / "converted", dtype)
        a, b = (tmp_path / name for name in ("exported", "converted"))
        weights = "model.safetensors"
        assert (a / weights).read_bytes() == (b / weights).read_bytes()
        assert read_config(a) == read_config(b)
        assert (b / "tokenizer.json").read_text() == "{}"
    # From fp8, and over itself.
    convert(tmp_path / "converted", tmp_path / "converted")
    export(tmp_path / "exported", load(in_fp8), TINY, dtype=jnp.bfloat16)
    assert read_config(tmp_path / "exported") == read_config(tmp_path / "converted")
    found, expected = (tensors_of(tmp_path / name) for name in ("converted", "exported"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].float(), value.float(), rtol=2.0**-8, err_msg=name)


def test_a_run_is_exported_in_other_dtypes(in_fp8: Path, tmp_path: Path) -> None:
    stage = tmp_path / "run" / "stages" / "00-rl" / "model"
    export(stage, load(in_fp8), TINY)
    plan = (Path(__file__).parents[1] / "tiny.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(plan)
    for dtype in ("fp8", "float16"):
        export_run(tmp_path / "run", tmp_path / dtype, None, dtype)
        convert(stage, tmp_path / "expected", dtype)
        expected = tensors_of(tmp_path / "expected")
        for name, value in tensors_of(tmp_path / dtype).items():
            assert bytes_of(value) == bytes_of(expected[name]), name
    assert is_quantised(read_config(tmp_path / "fp8"))
    assert read_config(tmp_path / "float16")["torch_dtype"] == "float16"


def test_the_host_holds_one_expert(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "n_routed_experts": 32}
    config = ModelConfig.from_hugging_face(TINY.to_hugging_face() | sizes)
    export(tmp_path, random_params(config), config, dtype="fp8")
    load_params(tmp_path, config, single_device())  # compiles
    tracemalloc.start()
    try:
        load_params(tmp_path, config, single_device())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 256 * 512 * 4  # of the 32 that a layer stacks


# On the devices of two processes, whose shards begin and end within blocks.
ON_TWO_HOSTS = """
import json, sys
import jax, numpy as np
from r1jax.models import ModelConfig
from r1jax.sharding import make_layout
from r1jax.weights.hugging_face import Tensors, export, load_params, read_config

port, index, source, reference, target = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(index))
config = ModelConfig.from_hugging_face(read_config(source))
bytes_read, read = {}, Tensors.read

def counted(self, name, box):
    part = read(self, name, box)
    bytes_read[name] = bytes_read.get(name, 0) + part.nbytes
    return part

Tensors.read = counted
layout = make_layout({"expert": 2, "fsdp": 2, "tensor": 2})
params = load_params(source, config, layout)
expected = np.load(reference)
for path, leaf in jax.tree.leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[name][shard.index], err_msg=name)
split = params["layers"]["down"]
axes = ("layers", "expert", "mlp", "expert_embed")
assert split.sharding.is_equivalent_to(layout.sharding(axes), 4)
held = {s.index[1].indices(8)[:2] for s in split.addressable_shards}
export(target, params, config, dtype="fp8")
print(json.dumps([sorted(held), bytes_read]))
"""


def test_each_host_reads_the_experts_of_its_devices(in_fp8: Path, tmp_path: Path) -> None:
    reference = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(load(in_fp8))
    }
    np.savez(tmp_path / "reference.npz", **reference)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(path) for path in (in_fp8, tmp_path / "reference.npz", tmp_path / "to")]
    started = [
        forked.Process(
            *("-c", ON_TWO_HOSTS, str(port), str(index), *paths),
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said[0][1] + said[1][1]
    files = Tensors(in_fp8).types
    of_expert = re.compile(r"\.experts\.(\d+)\.\w+_proj\.weight$")
    everyones: set[int] = set()
    for out, _ in said:
        (held,), bytes_read = json.loads(out.splitlines()[-1])
        experts = set(range(*held))
        assert len(experts) == 4
        everyones |= experts
        for name, type in files.items():
            if (match := of_expert.search(name)) and int(match[1]) in experts:
                assert bytes_read[name] == type.nbytes, name  # once
            elif match:
                assert name not in bytes_read and scale_name(name) not in bytes_read
    assert everyones == set(range(8))
    before, after = tensors_of(in_fp8), tensors_of(tmp_path / "to")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if not name.endswith("_scale_inv"):
            assert bytes_of(after[name]) == bytes_of(value), name


# What is refused


def test_other_ways_to_quantise_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights are not there").touch()
    for change, message in (
        ({"quant_method": "gptq", "bits": 4}, "quant_method = 'gptq', bits = 4 is not supported"),
        ({"fmt": "e5m2"}, "fmt = 'e5m2' is not supported; only quant_method = 'fp8', fmt = 'e4m3'"),
        ({"weight_block_size": [1, 128]}, r"weight_block_size = \[1, 128\] is not"),
        ({"weight_block_size": None}, "weight_block_size = None is not"),
        ({"activation_scheme": "static"}, "activation_scheme = 'static' is not"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt = 'ue8m0' is not .*remove quantization_config from"),
    ):
        config = TINY.to_hugging_face() | {"quantization_config": QUANTIZATION_CONFIG | change}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    harmless = {"modules_to_not_convert": ["lm_head"], "dequantize": False, "scale_fmt": None}
    assert is_quantised({"quantization_config": QUANTIZATION_CONFIG | harmless})
    assert not is_quantised({}) and not is_quantised({"quantization_config": None})


def test_scales_that_do_not_fit_are_named(in_fp8: Path, tmp_path: Path) -> None:
    config = read_config(in_fp8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(in_fp8)
    attention = "model.layers.0.self_attn."
    scales = tensors[f"{attention}kv_b_proj.weight_scale_inv"]
    del tensors[f"{attention}q_a_proj.weight_scale_inv"]
    tensors |= {
        f"{attention}kv_b_proj.weight_scale_inv": scales[:1].clone(),
        f"{attention}kv_a_layernorm.weight_scale_inv": scales.clone(),
        "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    for part in (
        f"missing: {attention}q_a_proj.weight_scale_inv",
        f"not known: {attention}kv_a_layernorm.weight_scale_inv",
        f"misshapen: {attention}kv_b_proj.weight_scale_inv is [1, 1], expected [2, 1]",
        "other than BF16, F16, F32 and F8_E4M3 matrices: model.norm.weight is F8_E4M3",
    ):
        assert part in str(error.value)


def test_fp8_needs_its_config(in_fp8: Path, tmp_path: Path) -> None:
    shutil.copytree(in_fp8, tmp_path / "m")
    config = {k: v for k, v in read_config(in_fp8).items() if k != "quantization_config"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"F32 without a quantization_config: \S+ is F8_E4M3"):
        load(tmp_path / "m")


def test_fp8_without_scales_is_no_dtype_of_an_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float8_e4m3fn is not stored; give a dtype of bfloat16"):
        export(tmp_path / "m", random_params(), TINY, dtype=jnp.float8_e4m3fn)
