"""The module for multi-token prediction: its weights, and its function against transformers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from deepseek_models import PUBLISHED, TOKENS, make
from safetensors.numpy import load_file, save_file
from tiny_models import positions_of, whole_rows
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from r1jax.config.run_config import RunConfig
from r1jax.models import Decoder, Execution, ModelConfig, TokenRows, ahead_log_probs, declare
from r1jax.models.parameters import Params, is_spec
from r1jax.programs.program import forward_flops
from r1jax.run.models import build_decoder
from r1jax.settings.model import ModelSection
from r1jax.sharding import single_device
from r1jax.stages.sft.settings import SFTStage
from r1jax.stages.supervised import make_update, mtp_weight
from r1jax.train_step import init_train_state
from r1jax.weights.hugging_face import export, load_params, read_config, stored_names

LAYER = "model.layers.3."


class Module(torch.nn.Module):
    """DeepSeek-V3's module (arXiv 2412.19437, eq. 21-23), put together from transformers' parts."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = (
            DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3)
        )
        self.eh_proj = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)


def make_with_module(kind: str, directory: Path) -> tuple[torch.nn.Module, Module]:
    """A random model and module, stored as the released checkpoint is."""
    model = make(kind, directory)
    module = Module(model.config).eval()
    with torch.no_grad():
        for name, weight in [*module.named_parameters(), *module.named_buffers()]:
            weight.copy_(0.3 * torch.randn_like(weight) + ("norm" in name))
    tensors = load_file(directory / "model.safetensors")
    for name, value in module.state_dict().items():
        name = LAYER + name.removeprefix("layer.")
        if name == f"{LAYER}norm.weight":
            name = f"{LAYER}shared_head.norm.weight"
        if not name.startswith(f"{LAYER}mlp.experts."):
            tensors[name] = value.numpy()
            continue
        for expert, matrix in enumerate(value.numpy()):  # transformers 5 joins them
            place = f"{LAYER}mlp.experts.{expert}"
            if name.endswith("down_proj"):
                tensors[f"{place}.down_proj.weight"] = matrix
            else:
                gate, up = np.split(matrix, 2)
                tensors |= {f"{place}.gate_proj.weight": gate, f"{place}.up_proj.weight": up}
    tensors[f"{LAYER}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{LAYER}shared_head.head.weight"] = tensors["lm_head.weight"]
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "num_nextn_predict_layers": 1}))
    return model, module


# Weights


def test_the_module_makes_the_round_trip_and_its_copies_are_written(tmp_path: Path) -> None:
    make_with_module("like V3", tmp_path / "from")
    config = ModelConfig.from_hugging_face(read_config(tmp_path / "from"))
    assert config.prediction_layers == range(3, 4)
    params = load_params(tmp_path / "from", config, single_device())
    export(tmp_path / "to", params, config, max_shard_bytes=50_000)
    assert ModelConfig.from_hugging_face(read_config(tmp_path / "to")) == config
    before, after = (
        {k: v for file in d.glob("*.safetensors") for k, v in load_file(file).items()}
        for d in (tmp_path / "from", tmp_path / "to")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    # The copies need not be there.
    less = {k: v for k, v in before.items() if not k.endswith(("head.weight", "tokens.weight"))}
    less |= {name: before[name] for name in ("lm_head.weight", "model.embed_tokens.weight")}
    assert len(less) == len(before) - 2
    save_file(less, tmp_path / "from" / "model.safetensors")
    again = load_params(tmp_path / "from", config, single_device())
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_run_has_the_module_only_when_asked(tmp_path: Path) -> None:
    make_with_module("like V3", tmp_path)
    layout = single_device()
    without, _ = build_decoder(ModelSection(path=str(tmp_path)), layout)
    assert "prediction" not in load_params(tmp_path, without.config, layout)
    section = ModelSection(path=str(tmp_path), multi_token_prediction=True)
    assert "prediction" in load_params(tmp_path, build_decoder(section, layout)[0].config, layout)
    raw = {**read_config(tmp_path), "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"multi_token_prediction = true, but .* = 0"):
        build_decoder(section, layout)
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers = 2 is not supported"):
        ModelConfig.from_hugging_face({**raw, "num_nextn_predict_layers": 2})


def test_a_directory_without_the_module_is_refused_with_the_remedy(tmp_path: Path) -> None:
    make_with_module("like V3", tmp_path)
    config = ModelConfig.from_hugging_face(read_config(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    left = {name: value for name, value in tensors.items() if not name.startswith(LAYER)}
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no prediction module \(model\.layers\.3\..*to false"):
        load_params(tmp_path, config, single_device())
    del tensors[f"{LAYER}enorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.3\.enorm\.weight\."):
        load_params(tmp_path, config, single_device())


def test_the_published_module() -> None:
    config = ModelConfig.from_hugging_face({**PUBLISHED, "num_nextn_predict_layers": 1})
    assert ModelConfig.from_hugging_face(config.to_hugging_face()) == config
    specs = jax.tree.leaves(declare(config), is_leaf=is_spec)
    names = {name: spec.stored.file_shape for spec in specs for name in stored_names(spec)}
    copies = [name for spec in specs for name in spec.stored.copies]
    last = "model.layers.61."
    assert sorted(copies) == [f"{last}embed_tokens.weight", f"{last}shared_head.head.weight"]
    assert names[f"{last}eh_proj.weight"] == (7168, 14336)
    own = {name.removeprefix(last) for name in names if name.startswith(last)}
    layer = "model.layers.60."
    of_a_layer = {name.removeprefix(layer) for name in names if name.startswith(layer)}
    assert own - of_a_layer == {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
    }
    assert of_a_layer < own
    # 685 billion in the released files, the copies included.
    total = sum(math.prod(spec.shape) * (1 + len(spec.stored.copies)) for spec in specs)
    assert round(total / 1e9, 1) == 684.5
    # A token of the model itself is not multiplied by the module. Of that one it is by one expert
    # in 32, and by the head again.
    without = replace(config, num_nextn_predict_layers=0)
    assert forward_flops(config, 1, 8) == forward_flops(without, 1, 8)
    total = sum(math.prod(spec.shape) for spec in declare(config)["prediction"].values())
    experts = 3 * 256 * 7168 * 2048
    used = total - experts + experts / 32 + 7168 * 129280
    more = forward_flops(config, 1, 1, with_module=True) - forward_flops(config, 1, 1)
    assert more == pytest.approx(2 * used, rel=1e-3)


# The function


def theirs(model: torch.nn.Module, module: Module, tokens: np.ndarray) -> tuple[Any, Any]:
    """Logits of the next token at every step, and of the one after it at all but the last."""
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state  # after the final norm
        time = ids.shape[1] - 1
        embedded = module.enorm(model.model.embed_tokens(ids[:, 1:]))
        x = module.eh_proj(torch.cat([embedded, module.hnorm(hidden[:, :-1])], dim=-1))
        places = torch.arange(time)[None]
        causal = torch.full((time, time), -torch.inf).triu(1)[None, None]
        turned = model.model.rotary_emb(x, places)
        x = module.layer(x, attention_mask=causal, position_embeddings=turned)
        ahead = model.lm_head(module.norm(x))
        return model.lm_head(hidden), ahead


def load(directory: Path, **execution: Any) -> tuple[Params, Decoder]:
    config = ModelConfig.from_hugging_face(read_config(directory))
    settings = Execution(compute_dtype=jnp.float32, **{"remat": "none", **execution})
    model = Decoder(config, settings, single_device())
    return load_params(directory, config, model.layout), model


score = jax.jit(ahead_log_probs, static_argnums=2)
SCANNED = {"scan_layers": True, "log_prob_chunk": 7}  # as most tests compute, with one program


@pytest.mark.parametrize(("kind", "scan"), [("like V3", True), ("like Moonlight", False)])
def test_the_token_after_the_next_as_transformers_parts_predict_it(
    kind: str, scan: bool, tmp_path: Path
) -> None:
    model, module = make_with_module(kind, tmp_path)
    following, ahead = theirs(model, module, TOKENS)
    params, ours = load(tmp_path, scan_layers=scan, log_prob_chunk=7)
    found = score(params, whole_rows(TOKENS), ours)
    log_probs = torch.log_softmax(ahead[:, :-1], dim=-1).numpy()
    targets = TOKENS[:, 2:, None]
    expected = np.take_along_axis(log_probs, targets, axis=-1)[..., 0]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found.ahead[:, 2:], expected, atol=1e-4)
    np.testing.assert_array_equal(found.ahead[:, :2], 0)
    agrees = ahead[:, :-1].argmax(-1) == following[:, 1:-1].argmax(-1)
    np.testing.assert_array_equal(found.agrees[:, 2:], agrees.numpy())
    assert not found.agrees[:, :2].any()
    log_probs = torch.log_softmax(following[:, :-1], dim=-1).numpy()
    expected = np.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.log_probs[:, 1:], expected, atol=1e-4)


def test_documents_in_a_row_know_nothing_of_each_other(tmp_path: Path) -> None:
    """Packed, and alone: the same; a document of two tokens has nothing to predict."""
    make_with_module("like V3", tmp_path)
    params, model = load(tmp_path, **SCANNED)
    alone = score(params, whole_rows(TOKENS), model)
    tokens = np.concatenate([TOKENS[:1, :9], TOKENS[:1, :2], TOKENS[1:, :10], TOKENS[:1, 21:]], 1)
    lengths = (9, 2, 10, 3)  # the last are padding
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat([1, 2, 3, 0], lengths)[None]
    packed = score(params, TokenRows(tokens, positions, segments), model)
    for part in ("log_probs", "ahead", "agrees"):
        found, expected = (np.asarray(getattr(scores, part)) for scores in (packed, alone))
        np.testing.assert_allclose(found[0, :9], expected[0, :9], atol=1e-5, err_msg=part)
        np.testing.assert_allclose(found[0, 11:21], expected[1, :10], atol=1e-5, err_msg=part)
        assert not found[0, 21:].any()
    assert not np.asarray(packed.ahead)[0, 9:11].any()
    assert np.count_nonzero(packed.ahead) == 7 + 8


# The loss


STAGE = {
    "name": "sft",
    "data": "d",
    "steps": 9,
    "rows_per_step": 2,
    "row_tokens": 24,
    "micro_batches": 2,
    "optimizer": {"learning_rate": 1.0},
}


def test_the_update_is_that_of_both_losses(tmp_path: Path) -> None:
    """Means over the tokens of the batch, though its parts have different numbers of them."""
    make_with_module("like V3", tmp_path)
    params, model = load(tmp_path, remat="full", log_prob_chunk=5)
    plain = replace(model, execution=replace(model.execution, remat="none", **SCANNED))
    segments = np.ones_like(TOKENS)
    segments[1, 6:] = 0
    rows = TokenRows(TOKENS, positions_of(TOKENS), segments)
    trained = (segments > 0) & (positions_of(TOKENS) >= 1)
    trained[0, 1:9] = False
    batch = {"tokens": TOKENS, "positions": positions_of(TOKENS)}
    batch |= {"segment_ids": segments, "trained": trained}
    # Of the first row tokens 9..23, of the second 1..5, of which the first has no module's word.
    own, ahead = 15 + 5, 15 + 4

    def both(params: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        scores = ahead_log_probs(params, rows, plain)
        first = -jnp.sum(jnp.where(trained, scores.log_probs, 0.0)) / own
        second = -jnp.sum(jnp.where(trained, scores.ahead, 0.0)) / ahead
        return first + 0.3 * second, (first, second)

    gradients, (first, second) = jax.device_get(jax.jit(jax.grad(both, has_aux=True))(params))
    stage = SFTStage(**STAGE, mtp_weight=[{"step": 0, "weight": 9.0}, {"step": 4, "weight": 0.3}])
    optimizer = optax.sgd(1.0)
    state = init_train_state(params, optimizer).replace(step=jnp.int32(5))
    after, metrics = jax.jit(make_update(stage, model, optimizer))(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(first), rel=1e-5)
    assert float(metrics["mtp/loss"]) == pytest.approx(float(second), rel=1e-5)
    scores = score(params, rows, plain)
    accepted = int((np.asarray(scores.agrees) & trained).sum())
    assert float(metrics["mtp/acceptance"]) == pytest.approx(accepted / ahead)
    moved = jax.tree.map(np.subtract, *jax.device_get((params, after.params)))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(moved), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)
        if "router_bias" not in name:
            assert np.abs(a).max() > 1e-4, name


def test_the_weight_changes_from_its_step_on() -> None:
    changes = [{"step": 0, "weight": 0.3}, {"step": 4, "weight": 0.1}]
    stage = SFTStage(**STAGE, mtp_weight=changes)
    found = [float(mtp_weight(stage, jnp.int32(step))) for step in (0, 3, 4, 8)]
    assert found == pytest.approx([0.3, 0.3, 0.1, 0.1])
    with pytest.raises(ValueError, match="mtp_weight\\n.*steps must start at 0"):
        SFTStage(**STAGE, mtp_weight=changes[1:])


def test_a_run_is_refused_that_trains_a_module_which_it_has_not() -> None:
    raw = {
        "name": "r",
        "model": {"path": "m"},
        "data": {"d": {"source": "jsonl:d"}},
        "stages": [{**STAGE, "kind": "sft", "mtp_weight": 0.3}],
    }
    with pytest.raises(ValueError, match=r"sft\.mtp_weight needs .* model\.multi_token_prediction"):
        RunConfig.model_validate(raw)
    raw["model"] = {"path": "m", "multi_token_prediction": True}
    assert RunConfig.model_validate(raw).model.multi_token_prediction
