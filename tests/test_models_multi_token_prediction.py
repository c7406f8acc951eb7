"""The module for multi-token prediction: its weights, and its function against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from test_models_deepseek import PUBLISHED, make
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from r1jax.config.schema import ModelSection
from r1jax.models import ModelConfig, declare
from r1jax.models.parameters import is_spec
from r1jax.planner.programs import forward_flops
from r1jax.sharding import single_device
from r1jax.stages.context import build_decoder
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
    # A token of the model itself is not multiplied by the module.
    without = replace(config, num_nextn_predict_layers=0)
    assert forward_flops(config, 1, 8) == forward_flops(without, 1, 8)
