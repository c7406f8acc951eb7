"""Loading and exporting in pieces: what is read, what is held, and what can go wrong."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from compiled_programs import devices
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from r1jax.models import ModelConfig, declare
from r1jax.models.parameters import Params, is_spec
from r1jax.sharding import single_device
from r1jax.weights import hugging_face
from r1jax.weights.hugging_face import (
    export,
    load_params,
    read_config,
    resolve,
    tensor_files,
)

CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
WEIGHTS = "model.safetensors"


def random_params(config: ModelConfig = CONFIG, dtype: Any = np.float32) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.standard_normal(spec.shape, np.float32).astype(dtype)),
        declare(config),
        is_leaf=is_spec,
    )


def load(directory: Path, config: ModelConfig = CONFIG, dtype: Any = jnp.float32) -> Params:
    return load_params(directory, config, single_device(), dtype)


def assert_same_bits(actual: Params, expected: Params) -> None:
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def edit(directory: Path, **changes: np.ndarray | None) -> None:
    """Change tensors of a single-file directory; names with __ for dots, None removes."""
    tensors = load_file(directory / WEIGHTS)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_and_written_exactly(kind: Any, tmp_path: Path) -> None:
    # Values down to float16's subnormals, which hardware conversions may flush to zero.
    params = jax.tree.map(
        lambda x: (x * np.float32(2.0**-20) ** (x > 0)).astype(kind), random_params()
    )
    export(tmp_path / "a", params, CONFIG)
    assert read_config(tmp_path / "a")["dtype"] == np.dtype(kind).name
    wide = load(tmp_path / "a")
    assert_same_bits(wide, jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params))
    export(tmp_path / "b", wide, CONFIG, dtype=kind)
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()


def test_files_hold_at_most_the_bytes_asked_for(tmp_path: Path) -> None:
    params = random_params()
    export(tmp_path / "m", params, CONFIG, max_shard_bytes=5_000)
    index = json.loads((tmp_path / "m" / f"{WEIGHTS}.index.json").read_text())
    sizes = {}
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "m" / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == tensors.keys()
        sizes[file] = sum(t.nbytes for t in tensors.values())
    assert len(sizes) > 5 and max(sizes.values()) <= 5_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert_same_bits(load(tmp_path / "m"), params)


def test_the_host_holds_about_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, hidden_size=128, intermediate_size=1024, num_hidden_layers=16)
    largest = 128 * 1024 * 4
    params = random_params(config)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert total > 40 * largest
    export(tmp_path / "m", params, config)
    load(tmp_path / "m", config)  # compiles

    reads: list[int] = []
    read = hugging_face.Tensors.read

    def counted(self: Any, name: str, box: tuple[slice, ...]) -> np.ndarray:
        part = read(self, name, box)
        reads.append(part.nbytes)
        return part

    monkeypatch.setattr(hugging_face.Tensors, "read", counted)
    tracemalloc.start()
    try:
        load(tmp_path / "m", config)
        loading = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        export(tmp_path / "m2", params, config)
        exporting = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(reads) == largest and sum(reads) == total  # each value once
    assert loading < 4 * largest
    assert exporting < 4 * largest


ON_EIGHT_DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from r1jax.models import (
    Decoder, Execution, ModelConfig, TokenRows, abstract_params, token_log_probs
)
from r1jax.sharding import make_layout, single_device
from r1jax.weights import hugging_face
from r1jax.weights.hugging_face import export, load_params, read_config

source, target = sys.argv[1:]
config = ModelConfig.from_hugging_face(read_config(source))
alone = single_device()
reference = load_params(source, config, alone)
tokens = np.arange(4 * 6, dtype=np.int32).reshape(4, 6) % config.vocab_size
positions = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)

def scores(params, layout):
    model = Decoder(config, Execution(compute_dtype=jnp.float32, remat="none"), layout)
    rows = TokenRows(tokens, positions, np.ones_like(tokens))
    function = lambda p: token_log_probs(p, rows, model).log_probs
    return jax.device_get(jax.jit(function)(params))

read, count = hugging_face.Tensors.read, 0
def counted(self, name, box):
    global count
    part = read(self, name, box)
    count += part.nbytes
    return part
hugging_face.Tensors.read = counted

total = sum(leaf.nbytes for leaf in jax.tree.leaves(reference))
for axes, overrides in (
    ({"data": 2, "fsdp": 2, "tensor": 2}, {}),
    ({"fsdp": 8}, {}),
    # Cuts within merged dimensions, and layers across devices.
    ({"data": 4, "tensor": 2}, {"heads": None, "kv_heads": None, "head_dim": "tensor"}),
    ({"fsdp": 8}, {"layers": "fsdp", "embed": None, "vocab": None}),
):
    layout = make_layout(axes, overrides)
    abstract = abstract_params(config, layout, jnp.float32)
    count = 0
    params = load_params(source, config, layout)
    within = "head_dim" in overrides
    assert count == total or within and count < 2 * total, (axes, count, total)
    for (path, a), b, want in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(reference), jax.tree.leaves(abstract),
        strict=True,
    ):
        where = jax.tree_util.keystr(path)
        assert a.sharding.is_equivalent_to(want.sharding, a.ndim), (axes, where, a.sharding)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=where)
    if not overrides:
        export(target, params, config)
    if "data" in axes and not overrides:
        np.testing.assert_allclose(scores(params, layout), scores(reference, alone), atol=1e-5)
print("equal on", len(jax.devices()))
"""


def test_eight_devices_get_the_same_weights_and_read_each_byte_once(tmp_path: Path) -> None:
    config = replace(CONFIG, num_hidden_layers=8)
    # Small weights, so that sums in another order stay close.
    params = jax.tree.map(lambda x: 0.3 * x, random_params(config))
    export(tmp_path / "from", params, config)
    folders = (str(tmp_path / "from"), str(tmp_path / "to"))
    done = forked.run("-c", ON_EIGHT_DEVICES, *folders, env=os.environ | devices(8))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["equal", "on", "8"]
    assert (tmp_path / "to" / WEIGHTS).read_bytes() == (tmp_path / "from" / WEIGHTS).read_bytes()


# What a directory can have wrong


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)
    params = random_params(config)
    export(tmp_path, params, config)
    edit(
        tmp_path,
        model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32),
        lm_head__weight=np.asarray(params["embed"]),
    )
    assert_same_bits(load(tmp_path, config), params)


def test_an_output_matrix_of_its_own_is_not_ignored(tmp_path: Path) -> None:
    config = replace(CONFIG, tie_word_embeddings=True)
    export(tmp_path, random_params(config), config)
    edit(tmp_path, lm_head__weight=np.ones((24, 16), np.float32))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load(tmp_path, config)


def test_every_misfit_is_named_at_once(tmp_path: Path) -> None:
    export(tmp_path, random_params(), CONFIG)
    edit(
        tmp_path,
        model__norm__weight=None,
        model__layers__2__mlp__up_proj__weight=np.ones((32, 15), np.float32),
        model__layers__1__mlp__up_proj__weight=np.ones((32, 16), np.int8),
        model__layers__3__mlp__up_proj__weight=np.ones((32, 16), np.float32),
    )
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    for part in (
        str(tmp_path),
        "missing: model.norm.weight",
        "not known: model.layers.3.mlp.up_proj.weight",
        "misshapen: model.layers.2.mlp.up_proj.weight is [32, 15], expected [32, 16]",
        "model.layers.1.mlp.up_proj.weight is I8",
    ):
        assert part in str(error.value)


def test_incomplete_directories_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON .* again"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="only pytorch_model.bin; write safetensors"):
        load(tmp_path)

    export(tmp_path, random_params(), CONFIG)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load(tmp_path)

    lying = whole.replace(b'"shape": [24, 16]', b'"shape": [25, 16]', 1)
    assert lying != whole
    (tmp_path / WEIGHTS).write_bytes(lying)
    with pytest.raises(ValueError, match=r"not a whole .* \[25, 16\] has 1536 bytes"):
        load(tmp_path)

    export(tmp_path, random_params(), CONFIG, max_shard_bytes=20_000)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"lacks {lost.name}"):
        load(tmp_path)


def test_names_resolve_to_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'some-org/absent': .* copy the model's directory"):
        resolve("some-org/absent")
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve("some-org/model") == tmp_path
    assert asked["name"] == "some-org/model"
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    others = ["pytorch_model.bin", "original/x.safetensors", "consolidated.safetensors", "m.gguf"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files + others, **patterns)) == files


# Export


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens. AutoTokenizer takes any qwen2 directory for a byte-level BPE tokenizer."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefg", "\u0120"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def test_special_ids_reach_the_configs(tmp_path: Path) -> None:
    params = random_params()
    export(tmp_path, params, CONFIG, tokenizer=tiny_tokenizer())
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.eos_token_id, generation.pad_token_id) == (1, 0)
    assert AutoTokenizer.from_pretrained(tmp_path)("bad gag").input_ids == [3, 2, 5, 9, 8, 2, 8]

    settings = {"eos_token_id": [1, 3], "temperature": 0.6}
    export(tmp_path, params, CONFIG, tokenizer=tiny_tokenizer(), generation_config=settings)
    written = hugging_face.read_generation_config(tmp_path)
    assert written == {**settings, "pad_token_id": 0}
    assert read_config(tmp_path)["eos_token_id"] == [1, 3]
    assert ModelConfig.from_hugging_face(read_config(tmp_path)) == CONFIG


def test_only_a_model_is_replaced_and_only_by_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(ValueError, match="has no config.json"):
        export(precious.parent, random_params(), CONFIG)
    assert precious.exists()

    target = tmp_path / "model"
    export(target, random_params(), CONFIG)
    before = (target / WEIGHTS).read_bytes()
    doubled = jax.tree.map(lambda x: 2 * x, random_params())
    with monkeypatch.context() as patch:
        broken = tensor_files._write_safetensors

        def full_disk(path: Path, weights: Any) -> None:
            broken(path, weights[:5])
            raise OSError("no space left on device")

        patch.setattr(tensor_files, "_write_safetensors", full_disk)
        with pytest.raises(OSError, match="no space"):
            export(target, doubled, CONFIG)
    assert (target / WEIGHTS).read_bytes() == before
    export(target, doubled, CONFIG)
    assert_same_bits(load(target), doubled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model"]


def test_params_of_another_model_are_refused(tmp_path: Path) -> None:
    params = random_params()
    with pytest.raises(ValueError, match="differ in unembed"):
        export(tmp_path / "m", params, replace(CONFIG, tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight: shape \(24, 16\)"):
        export(tmp_path / "m", params, replace(CONFIG, vocab_size=25))
    with pytest.raises(ValueError, match="int8 is not stored; give a dtype of bfloat16"):
        export(tmp_path / "m", params, CONFIG, dtype=jnp.int8)
    assert not (tmp_path / "m").exists()
