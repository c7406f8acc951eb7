"""The shapes that come with r1jax, so that plans need no hub."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import jax
import pytest

from r1jax.config.load import load_config
from r1jax.config.packaged import packaged_configs, packaged_shape
from r1jax.models import ModelConfig, declare
from r1jax.models.parameters import is_spec
from r1jax.run.models import build_decoder
from r1jax.settings.model import ModelSection
from r1jax.sharding import single_device
from r1jax.weights import hugging_face

# Weights in billions, as the hub counts the tensors of each repository.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 0.1345,
    "Qwen/Qwen2.5-1.5B": 1.54,
    "Qwen/Qwen2.5-Math-1.5B": 1.54,
    "Qwen/Qwen2.5-Math-7B": 7.62,
    "Qwen/Qwen2.5-14B": 14.8,
    "Qwen/Qwen2.5-32B": 32.8,
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.3-70B-Instruct": 70.6,
    "deepseek-ai/DeepSeek-V2-Lite": 15.7,
    "deepseek-ai/DeepSeek-V3-Base": 671.0,  # without the prediction module
}


def shape_of(model: str) -> ModelConfig:
    path = packaged_shape(model)
    assert path is not None
    return ModelConfig.from_hugging_face(json.loads(path.read_text()))


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_shape_has_as_many_weights_as_the_model(model: str) -> None:
    shape = replace(shape_of(model), num_nextn_predict_layers=0)
    specs = jax.tree.leaves(declare(shape), is_leaf=is_spec)
    count = sum(math.prod(spec.shape) for spec in specs)
    digits = 4 if count < 1e9 else 2 if count < 1e10 else 1
    assert round(count / 1e9, digits) == PUBLISHED[model]


def test_shapes_agree_on_what_weights_do_not_tell() -> None:
    """Counting says nothing of norms and rotations."""
    maths, general, llama = (
        [shape_of(name) for name in PUBLISHED if part in name]
        for part in ("Math", "Qwen2.5-14B", "Llama")
    )
    assert {(c.rms_norm_eps, c.rope_theta, c.max_position_embeddings) for c in maths} == {
        (1e-6, 1e4, 4096)
    }
    assert {(c.rms_norm_eps, c.rope_theta) for c in general} == {(1e-5, 1e6)}
    assert {(c.rms_norm_eps, c.rope_theta) for c in llama} == {(1e-5, 5e5)}
    for config in llama:
        assert config.rope_scaling is not None and config.rope_scaling.factor == 8
    assert [c.tie_word_embeddings for c in maths] == [True, False]
    assert all(config.head_dim == 128 for config in (*maths, *general, *llama))


def test_a_plan_of_a_packaged_model_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    for model in PUBLISHED:
        assert hugging_face.find_config(model)["hidden_size"] == shape_of(model).hidden_size


def test_every_model_of_a_packaged_config_is_packaged() -> None:
    paths = {load_config(name).model.path for name in packaged_configs()}
    assert paths - {None} == set(PUBLISHED)


def test_a_run_is_told_where_its_model_is_not_the_planned_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "Qwen/Qwen2.5-Math-1.5B"
    raw = shape_of(name).to_hugging_face()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(hugging_face, "resolve", lambda _: tmp_path)
    build_decoder(ModelSection(path=name), single_device())  # a warning would be an error
    (tmp_path / "config.json").write_text(json.dumps(raw | {"vocab_size": 152064}))
    with pytest.warns(UserWarning, match=r"vocab_size = 152064, planned with 151936"):
        decoder, _ = build_decoder(ModelSection(path=name), single_device())
    assert decoder.config.vocab_size == 152064  # what is there counts
    assert hugging_face.differences_from_published("nobody/nothing", decoder.config) == []
    larger = replace(shape_of(name), hidden_size=1, head_dim=2)
    assert len(hugging_face.differences_from_published(name, larger)) == 2
