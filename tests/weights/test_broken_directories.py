"""Directories whose files do not fit together: refused in one line, or read as the index says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import make_model

from r1jax.data.tokenizers import load_tokenizer
from r1jax.models import ModelConfig
from r1jax.models.parameters import Params
from r1jax.run.models import LanguageModel
from r1jax.settings.model import ModelSection
from r1jax.sharding import single_device
from r1jax.weights.hugging_face import load_params, read_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model"
    make_model(directory)
    return directory


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def load(directory: Path) -> Params:
    config = ModelConfig.from_hugging_face(read_config(directory))
    return load_params(directory, config, single_device())


def assert_equal(actual: Params, expected: Params) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def split(directory: Path) -> dict[str, str]:
    """Two shards, of which the second has another value of the first tensor; the weight map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, files = list(tensors), ("a.safetensors", "b.safetensors")
    half = len(names) // 2
    save_file({name: tensors[name] for name in names[:half]}, directory / files[0])
    stale = {names[0]: 0 * tensors[names[0]]}
    save_file({name: tensors[name] for name in names[half:]} | stale, directory / files[1])
    return {name: files[index >= half] for index, name in enumerate(names)}


def write_index(directory: Path, weight_map: object) -> None:
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(content)


def test_the_index_says_which_shard_counts(model: Path, copy: Path) -> None:
    weight_map = split(copy)
    write_index(copy, weight_map)
    assert_equal(load(copy), load(model))
    write_index(copy, {**weight_map, "model.norm.weight": "a.safetensors"})
    with pytest.raises(ValueError, match=r"has model.norm.weight in a.safetensors, which does not"):
        load(copy)
    write_index(copy, {name: file for name, file in weight_map.items() if "norm" not in name})
    with pytest.raises(ValueError, match="missing: model.layers.0.input_layernorm.weight, model."):
        load(copy)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, ["a"], {"a": 1}, {"a": "../a.safetensors"}, {"a": "/etc/passwd"}]
)
def test_an_index_that_is_none_is_one_line(copy: Path, weight_map: object) -> None:
    split(copy)
    write_index(copy, weight_map)
    with pytest.raises(ValueError, match=r"index.json: weight_map"):
        load(copy)


Change = Callable[[dict[str, Any]], object]


def _offsets(shift: Callable[[int, int], list[object]]) -> Change:
    def change(header: dict[str, Any]) -> None:
        entry = header["model.norm.weight"]
        entry["data_offsets"] = shift(*entry["data_offsets"])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_offsets(lambda a, b: [a - 4, b - 4]), "overlap|leave a gap"),
        (_offsets(lambda a, b: [a + 4, b + 4]), "overlap|leave a gap"),
        (_offsets(lambda a, b: [0, b - a]), "overlap"),
        (_offsets(lambda a, b: [-8, b - a - 8]), "its header says"),
        (_offsets(lambda a, b: [b, a]), "data_offsets of model.norm.weight"),
        (_offsets(lambda a, b: [a]), "data_offsets of model.norm.weight"),
        (_offsets(lambda a, b: [str(a), str(b)]), "its header says"),
        (_offsets(lambda a, b: [2**62, 2**62 + b - a]), "leave a gap"),
        (lambda header: header.update({"model.norm.weight": None}), "its header says null"),
        (lambda header: header["model.norm.weight"].pop("dtype"), "its header says"),
        (lambda header: header["model.norm.weight"].update(shape=[-16]), "its header says"),
        (lambda header: header["model.norm.weight"].update(shape=[2**40, 2**40]), "bytes"),
    ],
)
def test_offsets_and_shapes_that_cannot_be_are_refused(
    copy: Path, change: Change, message: str
) -> None:
    raw = (copy / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    with pytest.raises(ValueError, match=f"is not a whole safetensors file .*({message})"):
        load(copy)


@pytest.mark.parametrize("header", [b"[1]", b"null", b"5", b"[" * 100_000, b"\xff{"])
def test_a_header_that_is_no_mapping_is_refused(copy: Path, header: bytes) -> None:
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="is not a whole safetensors file .its header is"):
        load(copy)


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], Mapping[str, Any]]) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(dict(change(tensors)), directory / "model.safetensors")


def set_config(directory: Path, **settings: object) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **settings}))


def test_names_without_the_prefix_are_read(model: Path, copy: Path) -> None:
    rewrite(copy, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    assert_equal(load(copy), load(model))


def test_an_absent_head_is_explained(copy: Path) -> None:
    rewrite(copy, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"no lm_head.weight, and .* tie_word_embeddings = true"):
        load(copy)
    set_config(copy, tie_word_embeddings=True)
    load(copy)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rope_scaling": LLAMA3, "rope_parameters": None},
            "lacks rope_scaling.low_freq_factor, rope_scaling.high_freq_factor, rope_scaling.orig",
        ),
        ({"rope_parameters": [1]}, "rope_parameters = .* needs a mapping"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta = 'x'"),
        ({"hidden_size": None}, "hidden_size = None of the model config"),
        ({"hidden_size": "96"}, "hidden_size = 96 of the model config: needs a whole number"),
        ({"hidden_size": 16.0}, "hidden_size = 16.0"),
        ({"hidden_size": 10**12}, "hidden_size = 1000000000000 .* from 1 to 1000000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads = -2"),
        ({"vocab_size": 2 * 10**9}, "vocab_size = 2000000000"),
        ({"max_position_embeddings": -1}, "max_position_embeddings = -1"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps = 'x' of the model config: needs a finite number"),
        ({"rope_theta": float("nan"), "rope_parameters": None}, "rope_theta = nan"),
        ({"model_type": ["qwen2"]}, "model_type = ..qwen2.. is not supported"),
        ({"vocab_size": 10**7}, "embed_tokens.weight is .272, 16., expected .10000000, 16."),
        ({"num_hidden_layers": 9_000}, "missing: .* and 107980 more"),
    ],
)
def test_a_config_that_no_model_has_is_refused_before_allocation(
    copy: Path, settings: dict[str, object], message: str
) -> None:
    set_config(copy, **settings)
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{", '{"model": {"type": "Evil"}}', "[" * 100_000]
)
def test_a_broken_tokenizer_is_one_line(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"copy/tokenizer.json is broken: .*; copy or ") as error:
        load_tokenizer(str(copy))
    assert "\n" not in str(error.value)


def test_a_panic_is_one_line(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = copy / "tokenizer.json"
    panics = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": panics}))
    with pytest.raises(ValueError, match=r"copy/tokenizer.json is broken: ") as error:
        load_tokenizer(str(copy))
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
        ("special_tokens_map.json", b"{"),
        ("added_tokens.json", b"{"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_beside_the_tokenizer_is_named(copy: Path, name: str, content: bytes) -> None:
    if name in ("special_tokens_map.json", "added_tokens.json"):
        # Read where tokenizer_config.json does not say the tokens.
        (copy / "tokenizer_config.json").unlink(missing_ok=True)
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"copy/{name} is broken: .*; copy or download"):
        load_tokenizer(str(copy))


def test_a_directory_without_a_tokenizer_says_so(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="copy': it has none of tokenizer.json, vocab.json"):
        load_tokenizer(str(copy))


def resolve_and_load(directory: Path) -> None:
    model = LanguageModel.resolve(ModelSection(path=str(directory)), single_device())
    model.load(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(copy: Path, value: float) -> None:
    resolve_and_load(copy)

    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors["model.norm.weight"][-1] = value
        return tensors

    rewrite(copy, spoil)
    with pytest.raises(ValueError, match="not finite in .*norm"):
        resolve_and_load(copy)


@pytest.mark.parametrize("eos", ["x", {"a": 1}, -5, 99_999_999_999, [2, None, 1.5], True])
def test_an_end_of_text_that_is_no_token_is_refused(copy: Path, eos: object) -> None:
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id = "):
        resolve_and_load(copy)


def test_tokens_that_share_an_id_are_refused(copy: Path) -> None:
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict.fromkeys(vocab, 0)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="two tokens one id"):
        resolve_and_load(copy)


def test_json_that_is_deep_or_of_another_kind_is_one_line(copy: Path) -> None:
    set_config(copy, quantization_config=[1])
    with pytest.raises(ValueError, match="quantization_config is a list"):
        resolve_and_load(copy)
    (copy / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="config.json is not JSON"):
        resolve_and_load(copy)
