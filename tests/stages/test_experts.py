"""A mixture of experts in the train stages: balance, and the experts of a rollout replayed."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny_models import jit, random_params

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.models import (
    Decoder,
    Execution,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    TokenRows,
    init_params,
    token_log_probs,
)
from r1jax.models.parameters import Params
from r1jax.run.resolve import check, resolve
from r1jax.sampler import GenerateOptions, Prompts, generate
from r1jax.settings.optimizer import BalanceSection, OptimizerSection
from r1jax.settings.sampling import SamplingSection
from r1jax.sharding import single_device
from r1jax.stages import supervised
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.train_step import init_train_state, make_optimizer

TINY = Path(__file__).parents[1] / "tiny.yaml"
CONFIG = ModelConfig(
    "deepseek_v3",
    *(20, 16, 32, 2, 2, 2, 8),
    initializer_range=0.4,
    latent=LatentAttention(None, 8, 4, 4, 6),
    experts=MixtureOfExperts(6, 1, 2, 8, first_k_dense_replace=1),
)
MODEL = Decoder(
    CONFIG,
    Execution(compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=8),
    single_device(),
)

# Without a dense layer, which the updates need not compile.
ROUTED = replace(
    MODEL,
    config=replace(
        CONFIG,
        num_hidden_layers=1,
        experts=MixtureOfExperts(6, 1, 2, 8, first_k_dense_replace=0),
    ),
)


def config(output: Path, **grpo: Any) -> RunConfig:
    """Supervised and reinforcement learning of a small mixture of experts."""
    plan = yaml.safe_load(TINY.read_text())
    plan["model"]["config"] = ROUTED.config.to_hugging_face()
    plan["model"]["scan_layers"] = False
    optimizer = {"learning_rate": 0.01, "weight_decay": 0.5}
    balance = {"bias_speed": 0.125, "sequence_loss": 0.01}
    base = {"steps": 2, "checkpoint_every": 2, "balance": balance, "optimizer": optimizer}
    zero = {"steps": 2, "held_out": None, "optimizer": optimizer, "samples_every": 10, **grpo}
    stages = plan["stages"]
    plan |= {"output": str(output), "stages": [stages[0] | base, stages[2] | zero]}
    output.mkdir()
    (output / "config.yaml").write_text(yaml.safe_dump(plan))
    return load_config(str(output / "config.yaml"))


def test_a_run_is_balanced_and_replays_experts(tmp_path: Path) -> None:
    assert recipe.run(config(tmp_path / "run", replay_experts=True)) == 0
    folders = [tmp_path / "run/tiny-s0/stages" / name for name in ("00-base", "01-zero")]
    base, zero = (
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in folders
    )
    for row in base + zero:
        assert 1 <= row["experts/max_load_mean"] == row["experts/max_load"] <= 3
        assert 0 <= row["experts/unused"] < 1
    assert all(0.5 < row["experts/imbalance"] < 3 for row in base)
    # In float32 the sampler and the trainer choose the same experts.
    assert zero[0]["sampler/gap_mean"] < 1e-4 and "penalty" not in zero[0]
    assert zero[0]["sampler/gap_mean_without_replay"] == pytest.approx(
        zero[0]["sampler/gap_mean"], abs=1e-4
    )
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    biases = [load_file(each / "model/model.safetensors")[name] for each in folders]
    # Two steps of 0.125, whatever the optimizer's rate and its weight decay; then none.
    assert set(np.abs(biases[0]).tolist()) <= {0.0, 0.125, 0.25} and biases[0].any()
    assert biases[1].tobytes() == biases[0].tobytes()


def unbiased_params(config: ModelConfig) -> Params:
    """Random weights, before any balancing."""
    params = random_params(config)
    for stack in params.keys() & {"layers", "prediction"}:
        params[stack]["router_bias"] = np.zeros_like(params[stack]["router_bias"])
    return params


def test_an_update_does_not_depend_on_micro_batches() -> None:
    rng = np.random.default_rng(0)
    segments = np.asarray([[1] * 6 + [2] * 4 + [0] * 2, [1] * 12] * 2, np.int32)
    positions = np.stack([np.concatenate([np.arange(6), np.arange(4), [0, 0]]), np.arange(12)] * 2)
    batch = {
        "tokens": rng.integers(0, 20, (4, 12)).astype(np.int32),
        "positions": positions.astype(np.int32),
        "segment_ids": segments,
        "trained": segments > 0,
    }
    optimizer = make_optimizer(OptimizerSection(learning_rate=1e-2), 10)
    params = unbiased_params(ROUTED.config)

    def update(**changes: Any) -> Any:
        settings = {"name": "base", "data": "x", "steps": 1, "rows_per_step": 4, "row_tokens": 12}
        stage = PretrainStage(**settings, optimizer=OptimizerSection(learning_rate=1e-2), **changes)
        made = supervised.make_update(stage, ROUTED, optimizer)
        return jit(made)(init_train_state(params, optimizer), batch)

    balance = BalanceSection(bias_speed=0.5, sequence_loss=0.1)
    (one, of_one), (two, of_two) = (update(balance=balance, micro_batches=n) for n in (1, 2))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    for name in of_one:
        np.testing.assert_allclose(of_one[name], of_two[name], rtol=1e-4, err_msg=name)
    # A mean over six sequences, as a loop over them would have it.
    rows = TokenRows(batch["tokens"], batch["positions"], batch["segment_ids"])
    measure = jit(functools.partial(token_log_probs, model=ROUTED, balance=True))
    routings = measure(params, rows).routings
    imbalance = np.asarray(routings["layers"].imbalance).sum() / 6
    np.testing.assert_allclose(of_one["experts/imbalance"], imbalance, rtol=1e-4)
    load = np.asarray(routings["layers"].load)
    assert load.sum() == 2 * (segments > 0).sum()
    moved = np.asarray(one.params["layers"]["router_bias"])
    np.testing.assert_array_equal(moved, 0.5 * np.sign(load.mean() - load))
    # The loss that is told is the next token's alone; the gradient is not.
    _, plain = update()
    np.testing.assert_allclose(of_one["loss"], plain["loss"], rtol=1e-5)
    assert abs(float(of_one["optimizer/grad_norm"] - plain["optimizer/grad_norm"])) > 1e-4


def test_the_module_for_the_token_after_the_next_is_balanced_too() -> None:
    model = replace(ROUTED, config=replace(ROUTED.config, num_nextn_predict_layers=1))
    tokens = np.random.default_rng(0).integers(0, 20, (1, 12)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "positions": np.arange(12, dtype=np.int32)[None],
        "segment_ids": np.ones_like(tokens),
        "trained": np.ones_like(tokens, bool),
    }
    settings = {"name": "base", "data": "x", "steps": 1, "rows_per_step": 1, "row_tokens": 12}
    stage = PretrainStage(
        **settings,
        mtp_weight=0.3,
        balance=BalanceSection(bias_speed=0.5, sequence_loss=0.1),
        optimizer=OptimizerSection(learning_rate=1e-2),
    )
    optimizer = make_optimizer(stage.optimizer, 1)
    params = unbiased_params(model.config)
    update = jit(supervised.make_update(stage, model, optimizer))
    state, metrics = update(init_train_state(params, optimizer), batch)
    for stack in ("layers", "prediction"):
        moved = np.unique(np.abs(state.params[stack]["router_bias"]))
        assert set(moved.tolist()) <= {0.0, 0.5} and 0.5 in moved
    assert 0.5 < metrics["experts/imbalance"] < 3


def test_replayed_experts_narrow_the_gap_between_sampler_and_trainer() -> None:
    """The sampler computes in bfloat16, so of close experts it sometimes takes the other one."""
    sampler = replace(MODEL, execution=replace(MODEL.execution, compute_dtype=jnp.bfloat16))
    params = init_params(jax.random.key(1), CONFIG, MODEL.layout)
    rng = np.random.default_rng(0)
    count, read, new = 16, 8, 16
    tokens = rng.integers(0, 20, (count, read)).astype(np.int32)
    lengths = np.where(np.arange(count) % 2, read, 5).astype(np.int32)
    prompts = Prompts(tokens, lengths, np.arange(count, dtype=np.uint32))
    options = GenerateOptions(2, new, seed=0, first_bucket=8, record_experts=True)
    samples = jax.device_get(generate(params, prompts, sampler, options))
    assert samples.experts.dtype == np.uint8
    assert samples.experts.shape == (count, 2, new, 1 * 2)
    assert samples.prompt_experts.shape == (count, 16 // 2, 2)

    rows = np.zeros((2 * count, read + new), np.int32)
    segments, drawn = np.zeros_like(rows), np.zeros(rows.shape, np.float32)
    experts = np.zeros((*rows.shape, 2), np.uint8)
    for row in range(2 * count):
        prompt, sample = divmod(row, 2)
        start, end = lengths[prompt], lengths[prompt] + new
        rows[row, :start], rows[row, start:end] = (
            tokens[prompt, :start],
            samples.tokens[prompt, sample],
        )
        experts[row, :start] = samples.prompt_experts[prompt, :start]
        experts[row, start:end] = samples.experts[prompt, sample]
        drawn[row, start:end] = samples.policy_log_probs[prompt, sample]
        segments[row, :end] = 1
    positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    inputs = TokenRows(rows, positions, segments)

    score = jit(functools.partial(token_log_probs, model=MODEL))

    def gap(chosen: np.ndarray | None) -> float:
        log_probs = score(params, inputs._replace(experts=chosen)).log_probs
        return float(np.abs(np.where(drawn != 0, log_probs - drawn, 0)).sum() / (drawn != 0).sum())

    own = np.asarray(score(params, inputs).routings["layers"].chosen)[0]
    read_by_both = segments > 0
    other = np.any(np.sort(own) != np.sort(experts), axis=-1)[read_by_both]
    assert 0 < other.mean() < 0.5  # most choices are the same: it is the sampler's record
    assert gap(experts) < 0.8 * gap(None)
    np.testing.assert_allclose(gap(own), gap(None), rtol=1e-3)


def test_weights_of_replayed_experts_are_learned() -> None:
    params = random_params(CONFIG)
    rows = np.random.default_rng(0).integers(0, 20, (2, 8)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), rows.shape)
    experts = np.broadcast_to(np.asarray([5, 2], np.uint8), (2, 8, 2))

    def total(params: Any) -> jax.Array:
        inputs = TokenRows(rows, positions, np.ones_like(rows), experts)
        return token_log_probs(params, inputs, MODEL).log_probs.sum()

    slopes = jit(jax.grad(total))(params)["layers"]
    assert np.abs(slopes["router"]).max() > 1e-3
    reached = np.abs(slopes["down"][0]).max(axis=(1, 2)) > 0
    assert reached.tolist() == [False, False, True, False, False, True]


def test_what_a_model_has_no_use_for_is_refused() -> None:
    tiny = str(Path(__file__).parents[1] / "tiny.yaml")
    config = load_config(tiny, ["stages.base.balance={bias_speed: 0.001}"])
    with pytest.raises(ConfigError, match=r"stages.base.balance.bias_speed = 0.001: .*no experts"):
        check(resolve(config))
    dense = replace(MODEL, config=ModelConfig("qwen2", 20, 16, 32, 1, 2, 1, 8))
    settings = {"name": "base", "data": "x", "steps": 1, "rows_per_step": 1, "row_tokens": 8}
    optimizer = OptimizerSection(learning_rate=1.0)
    stage = PretrainStage(**settings, optimizer=optimizer, balance=BalanceSection(bias_speed=0.001))
    with pytest.raises(ValueError, match=r"balance.bias_speed: .*no experts"):
        supervised.make_update(stage, dense, make_optimizer(optimizer, 1))
    greedy = MixtureOfExperts(4, 1, 2, 8, topk_method="greedy")
    model = replace(MODEL, config=replace(CONFIG, experts=greedy))
    with pytest.raises(ValueError, match="no biases; use balance.sequence_loss"):
        supervised.make_update(stage, model, make_optimizer(optimizer, 1))
    speculative = SamplingSection(speculative=True)
    with pytest.raises(ValueError, match="replay_experts = true with sampling.speculative"):
        GRPOStage(
            name="rl",
            data="x",
            steps=1,
            optimizer=optimizer,
            replay_experts=True,
            sampling=speculative,
        )
