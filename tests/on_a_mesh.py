"""Samples, log-probs and two GRPO updates on a mesh given as JSON; prints them as JSON."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.grpo import GRPOBatch
from r1jax.models import (
    Decoder,
    Execution,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    abstract_params,
    experts,
    init_params,
)
from r1jax.sampler import GenerateOptions, Prompts, generate, make_rollout_weights, to_sample
from r1jax.settings.objective import GRPOConfig
from r1jax.settings.optimizer import BalanceSection, OptimizerSection
from r1jax.sharding import Layout, make_layout, make_rollout_layout
from r1jax.stages.grpo.policy_update import make_update
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import abstract_train_state, create_train_state, make_optimizer, shardings_of

CONFIGS = {
    "dense": ModelConfig("qwen2", 32, 16, 32, 2, 4, 2, 8, initializer_range=0.4),
    "experts": ModelConfig(
        "deepseek_v3",
        *(32, 16, 32, 2, 4, 4, 8),
        initializer_range=0.4,
        latent=LatentAttention(None, 8, 4, 4, 6),
        experts=MixtureOfExperts(8, 1, 3, 8, first_k_dense_replace=1, n_group=4, topk_group=2),
    ),
}


def small_buffers() -> None:
    """Exchanges of experts in several rounds; of scripts alone, as it changes the process."""
    experts._LEAST_BUFFER = 4


def main(
    kind: str, axes: dict[str, int], scan: bool, rollout_axes: dict[str, int] | None = None
) -> dict[str, object]:
    config = CONFIGS[kind]
    count = int(np.prod(list(axes.values())))
    layout = make_layout(axes, devices=jax.devices()[:count])
    rollout_layout = make_rollout_layout(layout, rollout_axes)
    execution = Execution(
        compute_dtype=jnp.float32, scan_layers=scan, log_prob_chunk=4, expert_chunk=8
    )
    model = Decoder(config, execution, layout)
    params = init_params(jax.random.key(0), config, layout)
    if config.experts is not None:
        # Two experts that everyone chooses: their device is asked for more than it has room for.
        bias = params["layers"]["router_bias"]
        params["layers"]["router_bias"] = bias.at[:, :2].set(2.0)

    sampler = to_sample(model, rollout_layout)
    to_sampler = make_rollout_weights(model, sampler)

    def put(x: np.ndarray, layout: Layout = layout) -> jax.Array:
        axes = ("batch", *(None,) * (x.ndim - 1))
        return jax.device_put(x, layout.sharding(axes, shape=x.shape))

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (8, 8)).astype(np.int32)
    asked = (tokens, np.full(len(tokens), 8, np.int32), np.arange(len(tokens), dtype=np.uint32))
    prompts = Prompts(*(put(x, rollout_layout) for x in asked))
    replay = config.experts is not None
    options = GenerateOptions(samples=2, max_new_tokens=8, seed=1, record_experts=replay)
    samples = generate(to_sampler(params), prompts, sampler, options)
    rows = np.concatenate([np.repeat(tokens, 2, 0), np.asarray(samples.tokens).reshape(16, 8)], 1)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), rows.shape)
    inputs = {"tokens": rows, "positions": positions, "segment_ids": np.ones_like(rows)}
    if replay:
        asked_of, answered = np.asarray(samples.prompt_experts), np.asarray(samples.experts)
        inputs["experts"] = np.concatenate(
            [np.repeat(asked_of[:, :8], 2, 0), answered.reshape(16, 8, -1)], 1
        )
    batch = GRPOBatch(
        inputs, (positions >= 8).astype(np.float32), rng.normal(size=16).astype(np.float32)
    )
    batch = jax.tree.map(put, batch)
    stage = GRPOStage(
        name="rl",
        data="questions",
        steps=10,
        questions_per_step=8,
        outputs_per_question=2,
        micro_batches=2,
        loss=GRPOConfig(kl_coefficient=0.0, importance_cap=None),
        optimizer=OptimizerSection(learning_rate=1e-3),
        balance=BalanceSection(bias_speed=0.125, sequence_loss=0.1) if replay else BalanceSection(),
        replay_experts=replay,
    )
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    abstract = abstract_train_state(abstract_params(config, layout, jnp.float32), optimizer, layout)
    step = make_update(stage, model, optimizer, stage.micro_batches)
    update = jax.jit(step, donate_argnums=0, out_shardings=(shardings_of(abstract), None))
    state = create_train_state(params, optimizer, abstract)
    norms, figures = [], []
    for _ in range(2):
        state, metrics = update(state, batch)
        norms.append(float(metrics["optimizer/grad_norm"]))
        figures.append([float(v) for name, v in sorted(metrics.items()) if "experts/" in name])
        figures[-1].append(float(metrics.get("penalty", 0.0)))
    return {
        "devices": count,
        "tokens": np.asarray(samples.tokens).tolist(),
        "log_probs": np.asarray(samples.policy_log_probs).tolist(),
        "grad_norms": norms,
        "figures": figures,
        "weights": {
            name: np.asarray(state.params["layers"][name]).ravel().tolist()
            for name in ("q", "gate", "down", *(("router", "router_bias") if replay else ()))
        },
        "compilations": update._cache_size(),
        "split": len({str(s.index) for s in state.params["layers"]["gate"].addressable_shards}),
    }


if __name__ == "__main__":
    small_buffers()
    print(json.dumps([main(*case) for case in json.loads(sys.argv[1])]))
