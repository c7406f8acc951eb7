"""Numerics against transformers' own models, and round trips through the disk."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from r1jax.models import Decoder, Execution, ModelConfig, forward, logits
from r1jax.sharding import single_device
from r1jax.weights.hugging_face import export, load_params, read_config

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3}),
}
MODELS = [f"{family} {tied}" for family in FAMILIES for tied in ("tied", "untied")]


def make(kind: str, directory: Path) -> torch.nn.Module:
    """A random model on disk, norms and biases moved away from their defaults."""
    torch.manual_seed(0)
    family, tied = kind.split()
    build, config, options = FAMILIES[family]
    model = build(config(**SIZES, **options, tie_word_embeddings=tied == "tied")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(directory)
    return model


def run(directory: Path, tokens: np.ndarray, **execution: object) -> np.ndarray:
    config = ModelConfig.from_hugging_face(read_config(directory))
    settings = Execution(compute_dtype=jnp.float32, remat="none", **execution)  # type: ignore[arg-type]
    model = Decoder(config, settings, single_device())
    params = load_params(directory, config, model.layout)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = forward(params, jnp.asarray(tokens), positions, jnp.ones_like(positions), model)
    return np.asarray(logits(params, hidden, model))


def reference(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_round_trip_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path / "from")
    tokens = np.random.default_rng(0).integers(0, 61, (2, 40))
    expected = reference(theirs, tokens)
    assert np.abs(expected).max() > 1  # a model that says something
    np.testing.assert_allclose(run(tmp_path / "from", tokens), expected, atol=1e-4)

    config = ModelConfig.from_hugging_face(read_config(tmp_path / "from"))
    params = load_params(tmp_path / "from", config, single_device())
    export(
        tmp_path / "to",
        params,
        config,
        generation_config={"eos_token_id": [1, 2]},
        max_shard_bytes=20_000,
    )
    assert len(list((tmp_path / "to").glob("*.safetensors"))) > 1
    before = load_file(tmp_path / "from" / "model.safetensors")
    after: dict[str, np.ndarray] = {}
    for file in (tmp_path / "to").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype=torch.float32).eval()
    np.testing.assert_allclose(reference(again, tokens), expected, atol=1e-5)
    assert again.generation_config.eos_token_id == [1, 2]


def test_bfloat16_round_trip_is_exact(tmp_path: Path) -> None:
    make("qwen2 tied", tmp_path / "f32")
    config = ModelConfig.from_hugging_face(read_config(tmp_path / "f32"))
    params = load_params(tmp_path / "f32", config, single_device(), jnp.bfloat16)
    export(tmp_path / "bf16", params, config)
    again = load_params(tmp_path / "bf16", config, single_device(), jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert a.dtype == jnp.bfloat16
        assert a.tobytes() == b.tobytes()


def test_bad_tensors_are_all_named(tmp_path: Path) -> None:
    make("llama untied", tmp_path)
    config = ModelConfig.from_hugging_face(read_config(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stranger"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_params(tmp_path, config, single_device())
    message = str(error.value)
    assert "missing: model.norm.weight" in message
    assert "not known: stranger" in message
    assert "lm_head.weight is [61, 31], expected [61, 32]" in message


def test_unsupported_configs_are_refused(tmp_path: Path) -> None:
    make("qwen2 tied", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="model_type = 'gpt2'"):
        ModelConfig.from_hugging_face({**raw, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="yarn"):
        ModelConfig.from_hugging_face({**raw, "rope_parameters": {"rope_type": "yarn"}})
    with pytest.raises(ValueError, match="use_sliding_window"):
        ModelConfig.from_hugging_face({**raw, "use_sliding_window": True})
