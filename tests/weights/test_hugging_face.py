"""Numerics against transformers' own models, and round trips through the disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from r1jax.data.padded_rows import pad_texts
from r1jax.data.tokenizers import load_tokenizer
from r1jax.models import Decoder, Execution, ModelConfig, TokenRows, forward, logits
from r1jax.models.reward_head import reward_scores
from r1jax.sharding import single_device
from r1jax.weights.hugging_face import check_padding, export, load_params, read_config

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
CLASSIFIERS = {
    "qwen2": Qwen2ForSequenceClassification,
    "qwen3": Qwen3ForSequenceClassification,
    "llama": LlamaForSequenceClassification,
}
PAD = 7
MODELS = [f"{family} {tied}" for family in FAMILIES for tied in ("tied", "untied")]


def make(kind: str, directory: Path) -> torch.nn.Module:
    """A random model on disk, norms and biases moved away from their defaults."""
    torch.manual_seed(0)
    family, tied, *scalar = kind.split()
    build, config, options = FAMILIES[family]
    if scalar:
        build, options = CLASSIFIERS[family], {**options, "num_labels": 1, "pad_token_id": PAD}
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
    rows = TokenRows(jnp.asarray(tokens), positions, jnp.ones_like(positions))
    hidden = forward(params, rows, model).hidden
    return np.asarray(logits(params, hidden, model))


def reference(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def assert_same_files(actual: Path, expected: Path) -> None:
    """The same tensors, bit for bit, in however many files."""
    before, after = (
        {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}
        for directory in (expected, actual)
    )
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].tobytes() == after[name].tobytes(), name


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
    assert_same_files(tmp_path / "to", tmp_path / "from")
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


# Reward models: the same decoder under a scalar head


SCALARS = ["qwen2 tied scalar", "qwen3 untied scalar", "llama untied scalar"]


def random_texts() -> list[np.ndarray]:
    """Of several lengths; the padding token may occur in a text, but does not end it."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 61, length, np.int32) for length in (1, 3, 17, 24, 23)]
    texts[2][:2] = texts[4][5] = PAD
    for text in texts:
        text[-1] = 1
    return texts


def their_rewards(model: torch.nn.Module, texts: list[np.ndarray]) -> np.ndarray:
    """In one batch, padded on the right; transformers finds the ends by the padding token."""
    longest = max(map(len, texts))
    tokens = np.stack([np.pad(t, (0, longest - len(t)), constant_values=PAD) for t in texts])
    lengths = np.asarray([[len(text)] for text in texts])
    with torch.no_grad():
        mask = torch.tensor(np.arange(longest) < lengths, dtype=torch.long)
        return model(torch.tensor(tokens), attention_mask=mask).logits[:, 0].numpy()


def our_rewards(directory: Path, texts: list[np.ndarray]) -> np.ndarray:
    config = ModelConfig.from_hugging_face(read_config(directory))
    settings = Execution(compute_dtype=jnp.float32, remat="none")
    model = Decoder(config, settings, single_device())
    params = load_params(directory, config, model.layout)
    return np.asarray(reward_scores(params, **pad_texts(texts, row_tokens=32), model=model))


@pytest.mark.parametrize("kind", SCALARS)
def test_rewards_and_round_trip_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    theirs, texts = make(kind, tmp_path / "from"), random_texts()
    expected = their_rewards(theirs, texts)
    assert np.ptp(expected) > 1  # a model that tells texts apart
    np.testing.assert_allclose(our_rewards(tmp_path / "from", texts), expected, atol=1e-4)

    config = ModelConfig.from_hugging_face(read_config(tmp_path / "from"))
    assert config.head == "scalar"
    params = load_params(tmp_path / "from", config, single_device())
    ids = {"eos_token_id": 1, "pad_token_id": PAD}
    export(tmp_path / "to", params, config, generation_config=ids)
    assert_same_files(tmp_path / "to", tmp_path / "from")
    assert ModelConfig.from_hugging_face(read_config(tmp_path / "to")) == config
    assert not (tmp_path / "to" / "generation_config.json").exists()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "to", dtype=torch.float32)
    assert again.num_labels == 1 and type(again) is type(theirs)
    np.testing.assert_allclose(their_rewards(again.eval(), texts), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2 tied", "llama untied"])
def test_a_reward_model_starts_from_a_language_model(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    language = ModelConfig.from_hugging_face(read_config(tmp_path))
    scalar = replace(language, head="scalar")
    trained = load_params(tmp_path, language, single_device())
    started, again, other = (
        load_params(tmp_path, scalar, single_device(), new_head=jax.random.key(seed))
        for seed in (0, 0, 1)
    )
    assert started.keys() - trained.keys() == {"score"}
    for name in trained.keys() - {"unembed"}:
        for a, b in zip(
            jax.tree.leaves(started[name]), jax.tree.leaves(trained[name]), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert started["score"].shape == (32, 1)
    assert 0.2 < np.std(started["score"]) < 0.4  # initializer_range
    np.testing.assert_array_equal(started["score"], again["score"])
    assert np.abs(started["score"] - other["score"]).max() > 0.1


def test_only_the_head_may_be_missing_and_none_is_thrown_away(tmp_path: Path) -> None:
    make("llama untied", tmp_path / "policy")
    scalar = replace(ModelConfig.from_hugging_face(read_config(tmp_path / "policy")), head="scalar")
    with pytest.raises(ValueError, match="missing: score.weight; not known: lm_head.weight"):
        load_params(tmp_path / "policy", scalar, single_device())
    tensors = load_file(tmp_path / "policy" / "model.safetensors")
    tensors["stranger"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "policy" / "model.safetensors")
    with pytest.raises(ValueError, match="missing: model.norm.weight; not known: stranger"):
        load_params(tmp_path / "policy", scalar, single_device(), new_head=jax.random.key(0))

    make("llama untied scalar", tmp_path / "rewards")
    with pytest.raises(ValueError, match=r"has a scalar head already \(score.weight\); load it"):
        load_params(tmp_path / "rewards", scalar, single_device(), new_head=jax.random.key(0))


def test_a_classifier_is_no_reward_model_and_a_reward_model_no_language_model(
    tmp_path: Path,
) -> None:
    make("qwen2 tied scalar", tmp_path)
    raw = read_config(tmp_path)
    labels = {"0": "bad", "1": "fair", "2": "good"}
    with pytest.raises(ValueError, match="ForSequenceClassification with 3 labels"):
        ModelConfig.from_hugging_face({**raw, "id2label": labels})
    unnamed = {name: value for name, value in raw.items() if name != "id2label"}
    with pytest.raises(ValueError, match="with 2 labels"):  # transformers' default
        ModelConfig.from_hugging_face(unnamed)
    assert ModelConfig.from_hugging_face({**unnamed, "num_labels": 1}).head == "scalar"

    model = Decoder(ModelConfig.from_hugging_face(raw), Execution(), single_device())
    params = load_params(tmp_path, model.config, model.layout)
    with pytest.raises(ValueError, match="head = 'scalar' has no logits"):
        logits(params, jnp.zeros((1, 32)), model)


def test_a_reward_model_needs_padding_that_ends_no_text(tmp_path: Path) -> None:
    make("qwen2 tied scalar", tmp_path / "from")
    config = ModelConfig.from_hugging_face(read_config(tmp_path / "from"))
    params = load_params(tmp_path / "from", config, single_device())
    tokenizer = load_tokenizer("characters:running_total")
    check_padding(tokenizer)
    export(tmp_path / "to", params, config, tokenizer=tokenizer)
    assert read_config(tmp_path / "to")["pad_token_id"] == tokenizer.pad_token_id

    with pytest.raises(ValueError, match="needs a padding token"):
        export(tmp_path / "none", params, config)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="pad_token_id = 1 is also the EOS .* tokenizer.pad_token"):
        export(tmp_path / "none", params, config, tokenizer=tokenizer)
    assert not (tmp_path / "none").exists()
