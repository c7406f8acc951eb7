"""Process reward models against transformers' token classification, and there and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import (
    AutoModelForTokenClassification,
    DeepseekV3ForTokenClassification,
    LlamaConfig,
    LlamaForTokenClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen3Config,
    Qwen3ForTokenClassification,
)

from r1jax.data.padded_rows import pad_texts
from r1jax.models import Decoder, Execution, ModelConfig
from r1jax.models.reward_head import reward_scores, token_label_logits
from r1jax.sharding import single_device
from r1jax.weights.hugging_face import export, load_params, read_config

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    pad_token_id=7,
)
QWEN2 = Qwen2Config(**SIZES, tie_word_embeddings=True, num_labels=1)
FAMILIES = {
    "qwen2": (Qwen2ForTokenClassification, Qwen2Config),
    "qwen3": (Qwen3ForTokenClassification, Qwen3Config),
    "llama": (LlamaForTokenClassification, LlamaConfig),
}


def make(family: str, directory: Path, labels: int = 2) -> torch.nn.Module:
    """A random model on disk, norms and biases moved away from their defaults."""
    torch.manual_seed(0)
    build, config = FAMILIES[family]
    model = build(config(**SIZES, num_labels=labels)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(directory)
    return model


def tensors(directory: Path) -> dict[str, bytes]:
    files = directory.glob("*.safetensors")
    return {name: x.tobytes() for file in files for name, x in load_file(file).items()}


def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 61, length, np.int32) for length in (1, 3, 17, 24)]


def theirs(model: torch.nn.Module, rows: list[np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(torch.tensor(row[None])).logits[0].numpy() for row in rows]


def ours(directory: Path, rows: list[np.ndarray]) -> list[np.ndarray]:
    """Of right-padded rows."""
    config = ModelConfig.from_hugging_face(read_config(directory))
    settings = Execution(compute_dtype=jnp.float32, remat="none")
    model = Decoder(config, settings, single_device())
    params = load_params(directory, config, model.layout)
    arrays = pad_texts(rows, row_tokens=32)
    del arrays["ends"]
    found = token_label_logits(params, **arrays, model=model)
    return [np.asarray(logits[: len(row)]) for logits, row in zip(found, rows, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_round_trip_agree_with_transformers(family: str, tmp_path: Path) -> None:
    model, rows = make(family, tmp_path / "from"), texts()
    expected = theirs(model, rows)
    assert np.ptp(np.concatenate(expected)) > 1  # a model that tells tokens apart
    for found, logits in zip(ours(tmp_path / "from", rows), expected, strict=True):
        np.testing.assert_allclose(found, logits, atol=1e-4)

    config = ModelConfig.from_hugging_face(read_config(tmp_path / "from"))
    assert config.head == "token_labels"
    params = load_params(tmp_path / "from", config, single_device())
    export(tmp_path / "to", params, config)  # it needs no padding token
    assert tensors(tmp_path / "to") == tensors(tmp_path / "from")
    assert ModelConfig.from_hugging_face(read_config(tmp_path / "to")) == config
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "to", dtype=torch.float32)
    assert type(again) is type(model) and again.config.id2label == {0: "wrong", 1: "right"}
    for found, logits in zip(theirs(again.eval(), rows), expected, strict=True):
        np.testing.assert_allclose(found, logits, atol=1e-5)


def test_a_process_reward_model_starts_from_a_language_model(tmp_path: Path) -> None:
    Qwen2ForCausalLM(QWEN2).save_pretrained(tmp_path / "from")
    language = ModelConfig.from_hugging_face(read_config(tmp_path / "from"))
    config = replace(language, head="token_labels")
    params = load_params(tmp_path / "from", config, single_device(), new_head=jax.random.key(0))
    assert params["score"].shape == (32, 2)
    np.testing.assert_array_equal(params["score_bias"], [0, 0])
    export(tmp_path / "to", params, config)
    rows = texts()
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "to", dtype=torch.float32)
    for found, logits in zip(ours(tmp_path / "to", rows), theirs(again.eval(), rows), strict=True):
        np.testing.assert_allclose(found, logits, atol=1e-4)


def test_other_heads_are_refused(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "three", labels=3)
    with pytest.raises(ValueError, match="with 3 labels is not supported: a process reward model"):
        ModelConfig.from_hugging_face(read_config(tmp_path / "three"))
    Qwen2ForSequenceClassification(QWEN2).save_pretrained(tmp_path / "scalar")
    scalar = ModelConfig.from_hugging_face(read_config(tmp_path / "scalar"))
    with pytest.raises(ValueError, match="missing: score.bias; misshapen: score.weight"):
        load_params(tmp_path / "scalar", replace(scalar, head="token_labels"), single_device())
    model = Decoder(scalar, Execution(), single_device())
    rows = pad_texts(texts(), 32)
    ends = rows.pop("ends")
    with pytest.raises(ValueError, match="head = 'scalar' has no labels"):
        token_label_logits({}, **rows, model=model)
    labels = replace(model, config=replace(scalar, head="token_labels"))
    with pytest.raises(ValueError, match="head = 'token_labels' gives no rewards"):
        reward_scores({}, **rows, ends=ends, model=labels)


def test_deepseek_v3_is_written_as_its_token_classification(tmp_path: Path) -> None:
    models = Path(__file__).parents[2] / "configs" / "models" / "deepseek-ai"
    raw = json.loads((models / "DeepSeek-V3-Base.json").read_text())
    config = replace(ModelConfig.from_hugging_face(raw), head="token_labels")
    written = config.to_hugging_face()["architectures"]
    assert written == [DeepseekV3ForTokenClassification.__name__]
