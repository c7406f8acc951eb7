"""DeepSeek-V2 and V3 against transformers, and the latent cache against whole rows."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from deepseek_models import KINDS, PUBLISHED, TOKENS, make
from safetensors.numpy import load_file, save_file
from tiny_models import decode_one, positions_of, whole_rows
from transformers import AutoModelForCausalLM

from r1jax.models import (
    Decoder,
    Execution,
    MixtureOfExperts,
    ModelConfig,
    TokenRows,
    YarnRopeScaling,
    declare,
    forward,
    logits,
    prefill,
    token_log_probs,
)
from r1jax.models.decoder import unstack_layers
from r1jax.models.experts import route
from r1jax.models.kv_cache import empty_cache, grow_cache
from r1jax.models.parameters import Params, is_spec
from r1jax.models.rope import rotations
from r1jax.programs.program import forward_flops
from r1jax.sampler import GenerateOptions, Prompts, generate
from r1jax.sampler.rollout_weights import weights_mover
from r1jax.sharding import single_device
from r1jax.weights.hugging_face import export, load_params, read_config, stored_names


def load(directory: Path, **execution: Any) -> tuple[Params, Decoder]:
    config = ModelConfig.from_hugging_face(read_config(directory))
    settings = Execution(compute_dtype=jnp.float32, remat="none", **execution)
    model = Decoder(config, settings, single_device())
    return load_params(directory, config, model.layout), model


@functools.cache
def _loaded(kind: str) -> tuple[Params, Decoder]:
    with tempfile.TemporaryDirectory() as folder:
        make(kind, Path(folder))
        params, model = load(Path(folder))
        return jax.device_get(params), model


def loaded(kind: str, scan_layers: bool) -> tuple[Params, Decoder]:
    """A random model of a kind; its weights, of which no test changes one, are NumPy's."""
    params, model = _loaded(kind)
    return params, replace(model, execution=replace(model.execution, scan_layers=scan_layers))


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params: Params, hidden: jax.Array, model: Decoder) -> jax.Array:
    return logits(params, hidden, model)


@functools.partial(jax.jit, static_argnums=1)
def whole_logits(params: Params, model: Decoder) -> jax.Array:
    return logits(params, forward(params, whole_rows(TOKENS), model).hidden, model)


def reference(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_round_trip_agree_with_transformers(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path / "from")
    expected = reference(theirs)
    assert np.abs(expected).max() > 1
    params, model = load(tmp_path / "from", scan_layers=kind == "like V3")
    np.testing.assert_allclose(whole_logits(params, model), expected, atol=1e-4)

    export(tmp_path / "to", params, model.config, max_shard_bytes=50_000)
    assert ModelConfig.from_hugging_face(read_config(tmp_path / "to")) == model.config
    before, after = (
        {k: v for file in d.glob("*.safetensors") for k, v in load_file(file).items()}
        for d in (tmp_path / "from", tmp_path / "to")
    )
    assert before.keys() == after.keys()
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in after
    for name, tensor in before.items():
        assert tensor.tobytes() == after[name].tobytes(), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype=torch.float32).eval()
    np.testing.assert_allclose(reference(again), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "scan"), [("like V3", True), ("like Moonlight", False)])
def test_prefill_and_decode_give_the_logits_of_whole_rows(
    kind: str, scan: bool, cache_of_platform: str
) -> None:
    """The absorbed form over the latent cache equals the expanded keys and values."""
    params, model = loaded(kind, scan_layers=scan)
    expected = np.asarray(whole_logits(params, model))
    lengths = np.asarray([6, 4], np.int32)
    hidden, prompts = jax.jit(prefill, static_argnums=3)(params, TOKENS[:, :6], lengths, model)
    first = np.asarray(logits_of(params, hidden, model))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(first[row, length - 1], expected[row, length - 1], atol=1e-4)

    weights = jax.jit(unstack_layers, static_argnums=1)(params, model)
    cache = jax.jit(empty_cache, static_argnums=(0, 1, 2, 3))(2, 2, 4, model)
    # 12 + 4 values per token and layer, whatever the number of heads.
    width = 16 if cache_of_platform == "cpu" else 128  # a TPU fills its tiles
    assert sum(leaf.size for leaf in jax.tree.leaves(cache)) == 2 * 2 * 4 * 3 * width
    assert model.config.cache_shapes == ((1, 16),)
    run = jax.jit(decode_one, static_argnums=5)
    for step in range(3):
        following = np.stack([TOKENS[row, length + step] for row, length in enumerate(lengths)])
        new = np.broadcast_to(following[:, None], (2, 2))
        hidden, cache = run(weights, new, np.int32(step), prompts, cache, model)
        found = np.asarray(logits_of(params, hidden, model))
        for row, length in enumerate(lengths):
            for sample in range(2):
                np.testing.assert_allclose(
                    found[row, sample], expected[row, length + step], atol=1e-4
                )


@pytest.mark.parametrize("scan", [True, False])
def test_a_cache_grows_behind_what_it_holds(scan: bool, cache_of_platform: str) -> None:
    _, model = loaded("like V3", scan_layers=scan)
    small, large = (
        jax.eval_shape(lambda time=time: empty_cache(2, 3, time, model, record_experts=True))
        for time in (4, 7)
    )
    rng = np.random.default_rng(0)
    small = jax.tree.map(lambda x: rng.integers(1, 6, x.shape).astype(x.dtype), small)
    grown = jax.device_get(jax.jit(grow_cache, static_argnums=(1, 2))(small, 3, model))
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, large)
    for before, after in zip(jax.tree.leaves(small), jax.tree.leaves(grown), strict=True):
        np.testing.assert_array_equal(after[tuple(slice(n) for n in before.shape)], before)
        assert np.sum(after, dtype=np.float32) == np.sum(before, dtype=np.float32)


def test_every_weight_learns_however_it_is_computed() -> None:
    cotangents = np.random.default_rng(1).standard_normal(TOKENS.shape, np.float32)

    def score(params: Params, model: Decoder) -> jax.Array:
        scores = token_log_probs(params, whole_rows(TOKENS), model)
        return jnp.sum(scores.log_probs * cotangents)

    gradients = jax.jit(jax.grad(score), static_argnums=1)
    params, scanned = loaded("like V3", scan_layers=True)
    _, unrolled = loaded("like V3", scan_layers=False)
    remat = replace(unrolled, execution=replace(unrolled.execution, remat="full"))
    expected, actual = jax.device_get((gradients(params, scanned), gradients(params, remat)))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3, err_msg=name)
        assert (np.abs(a).max() > 1e-3) == (name != "layers.router_bias"), name


def test_the_sampler_and_the_trainer_agree() -> None:
    """Samples of prompts of other lengths, a cache that grows, and weights that were moved."""
    params, policy = loaded("like V3", scan_layers=True)
    params = jax.device_put(params)
    sampler = replace(policy, execution=replace(policy.execution, scan_layers=False))
    moved = weights_mover(policy, sampler)(params)
    lengths, new = np.asarray([5, 3], np.int32), 6
    tokens = np.where(np.arange(5) < lengths[:, None], TOKENS[:, :5], 0)
    prompts = Prompts(tokens, lengths, np.arange(2, dtype=np.uint32))
    options = GenerateOptions(samples=2, max_new_tokens=new, seed=0, first_bucket=4)
    samples = jax.device_get(generate(moved, prompts, sampler, options))
    rows = np.zeros((4, 5 + new), np.int32)
    segments = np.zeros_like(rows)
    for row in range(4):
        prompt, end = row // 2, lengths[row // 2]
        rows[row, :end] = tokens[prompt, :end]
        rows[row, end : end + new] = samples.tokens[prompt, row % 2]
        segments[row, : end + new] = 1
    score = jax.jit(token_log_probs, static_argnums=2)
    scores = score(params, TokenRows(rows, positions_of(rows), segments), policy).log_probs
    for row in range(4):
        prompt, end = row // 2, lengths[row // 2]
        found = samples.policy_log_probs[prompt, row % 2]
        np.testing.assert_allclose(found, scores[row, end : end + new], atol=1e-4)


# The router


def chosen_by(scores: list[float], bias: list[float], **options: Any) -> tuple[Any, Any]:
    """What `route` makes of one token with these scores."""
    settings = {"norm_topk_prob": False, **options}
    experts = MixtureOfExperts(len(scores), 1, moe_intermediate_size=1, **settings)
    raw = np.asarray(scores, np.float32)
    router = np.log(raw / (1 - raw))[None]  # the inverse of the sigmoid
    chosen, weights, _ = route(np.ones((1, 1), np.float32), router, np.float32(bias), experts)
    return np.asarray(chosen)[0].tolist(), np.asarray(weights)[0]


def test_the_bias_chooses_and_does_not_weigh() -> None:
    chosen, weights = chosen_by([0.9, 0.5, 0.2, 0.4], [-1, 0, 0.4, 0], num_experts_per_tok=2)
    assert chosen == [2, 1]  # 0.6 and 0.5; the best score is biased away
    np.testing.assert_allclose(weights, [0.2, 0.5], rtol=1e-5)
    _, weights = chosen_by(
        [0.9, 0.5, 0.2, 0.4],
        [-1, 0, 0.4, 0],
        num_experts_per_tok=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    np.testing.assert_allclose(weights, [2.5 * 2 / 7, 2.5 * 5 / 7], rtol=1e-5)


def test_a_group_counts_by_its_two_best() -> None:
    scores = [0.9, 0.1, 0.1, 0.6, 0.5, 0.1]  # the sums are 1.0 and 1.1
    chosen, _ = chosen_by(scores, [0] * 6, num_experts_per_tok=2, n_group=2, topk_group=1)
    assert chosen == [3, 4]


def test_experts_outside_the_groups_are_never_chosen() -> None:
    """A mask of 0 instead of -inf would take expert 2 or 3, since all others are below it."""
    scores, bias = [0.4, 0.3, 0.2, 0.1], [-1, -1, -1, -1]
    chosen, _ = chosen_by(scores, bias, num_experts_per_tok=2, n_group=2, topk_group=1)
    assert chosen == [0, 1]


def test_no_gradient_reaches_the_bias_and_some_reaches_the_router() -> None:
    experts = MixtureOfExperts(4, 1, 2, 1)
    rng = np.random.default_rng(0)
    tokens, router = (rng.standard_normal(shape, np.float32) for shape in ((5, 3), (3, 4)))

    def first(router: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(route(tokens, router, bias, experts)[1][:, 0])

    of_router, of_bias = jax.grad(first, argnums=(0, 1))(router, np.zeros(4, np.float32))
    assert np.all(of_bias == 0) and np.abs(of_router).max() > 1e-3


# Configurations and directories


def test_the_published_model_has_its_published_sizes() -> None:
    config = ModelConfig.from_hugging_face(PUBLISHED)
    assert ModelConfig.from_hugging_face(config.to_hugging_face()) == config
    specs = jax.tree.leaves(declare(config), is_leaf=is_spec)
    assert round(sum(math.prod(spec.shape) for spec in specs) / 1e9) == 671
    assert config.cache_shapes == ((1, 576),) and config.num_hidden_layers == 61
    # 37 billion weights are activated by a token, of which looking it up is no product.
    assert round(forward_flops(config, 1, 1) / 2e9 + 129280 * 7168 / 1e9) in (37, 38)
    # The released index has 91,991 tensors: these; the prediction module, which is another layer
    # with six tensors of its own; and a scale of each matrix in the layers but the router.
    names = [(name, spec) for spec in specs for name in stored_names(spec)]
    assert len({name for name, _ in names}) == len(names)
    last = [(name, spec) for name, spec in names if name.startswith("model.layers.60.")]
    scaled = [
        name
        for name, spec in names + last
        if spec.per_layer and len(spec.stored.file_shape) == 2 and "mlp.gate." not in name
    ]
    assert len(names) + len(last) + 6 + len(scaled) == 91_991
    shapes = {name: spec.stored.file_shape for name, spec in names}
    assert shapes["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.0.self_attn.kv_b_proj.weight"] == (128 * 256, 512)
    assert shapes["model.layers.60.mlp.experts.255.down_proj.weight"] == (7168, 2048)


def test_yarn_sharpens_as_published() -> None:
    config = ModelConfig.from_hugging_face(PUBLISHED)
    assert isinstance(config.rope_scaling, YarnRopeScaling)
    assert config.rope_scaling.sharpening(1.0) == pytest.approx(0.1 * math.log(40) + 1)
    cos, sin = rotations(jnp.arange(3), config)
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, rtol=1e-6)  # mscale = mscale_all_dim


def test_what_is_not_deepseek_v3_is_refused(tmp_path: Path) -> None:
    make("like V3", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    config = ModelConfig.from_hugging_face(raw)
    for change, message in (
        ({"scoring_func": "tanh"}, "scoring_func = 'tanh' is not supported; known: sigmoid"),
        ({"topk_method": "greedy"}, "topk_group = 2 of n_group = 4: topk_method = 'greedy' knows"),
        ({"model_type": "deepseek_v2"}, "norm_topk_prob = True is not supported; only False"),
        ({"n_group": 3}, "n_routed_experts = 8 does not make n_group = 3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 of 4 experts"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace = 3 leaves no layer"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3' is not supported; known: .*yarn"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_hugging_face({**raw, **change})
    del raw["kv_lora_rank"]
    with pytest.raises(ValueError, match="lacks kv_lora_rank"):
        ModelConfig.from_hugging_face(raw)
    with pytest.raises(ValueError, match="head_dim = 10"):
        replace(config, head_dim=10)


def test_strangers_are_not_passed_over(tmp_path: Path) -> None:
    make("like V3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.4.eh_proj.weight"] = np.zeros((2, 2), np.float32)
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.2.mlp.experts.5.up_proj") as error:
        load(tmp_path)
    assert "not known: model.layers.4.eh_proj.weight" in str(error.value)


def test_the_routers_bias_stays_in_float32(tmp_path: Path) -> None:
    make("like V3", tmp_path / "f32")
    config = ModelConfig.from_hugging_face(read_config(tmp_path / "f32"))
    params = load_params(tmp_path / "f32", config, single_device(), jnp.bfloat16)
    assert params["layers"]["router_bias"].dtype == jnp.float32
    assert params["layers"]["router"].dtype == jnp.bfloat16
    export(tmp_path / "bf16", params, config)
    assert read_config(tmp_path / "bf16")["torch_dtype"] == "bfloat16"
    again = load_params(tmp_path / "bf16", config, single_device(), jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
