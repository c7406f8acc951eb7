"""Speculative samples and one update of both losses on meshes given as JSON; prints them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from models_with_modules import LATENT

from r1jax.models import Decoder, Execution, init_params
from r1jax.models.parameters import Params
from r1jax.sampler import GenerateOptions, Prompts, generate, make_rollout_weights, to_sample
from r1jax.settings.optimizer import OptimizerSection
from r1jax.sharding import make_layout, make_rollout_layout
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.supervised import make_update
from r1jax.train_step import init_train_state

CONFIG = replace(LATENT, vocab_size=8)  # which devices can share


TOKENS = np.random.default_rng(0).integers(0, 8, (4, 8)).astype(np.int32)


def main(axes: dict[str, int], rollout_axes: dict[str, int] | None, what: str) -> dict[str, Any]:
    """what: `samples`, `update`, or both."""
    layout = make_layout(axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    model = Decoder(CONFIG, Execution(compute_dtype=jnp.float32, log_prob_chunk=4), layout)
    params = init_params(jax.random.key(0), CONFIG, layout)
    found: dict[str, Any] = {}
    if "samples" in what:
        found |= sample(model, params, rollout_axes)
    if "update" in what:
        found |= update(model, params)
    return found


def sample(model: Decoder, params: Params, axes: dict[str, int] | None) -> dict[str, Any]:
    layout = make_rollout_layout(model.layout, axes)
    sampler = to_sample(model, layout)
    given = (TOKENS, np.full(4, 8, np.int32), np.arange(4, dtype=np.uint32))
    prompts = Prompts(*(jax.device_put(x, layout.sharding(("batch",))) for x in given))
    options = GenerateOptions(2, 8, seed=1, first_bucket=3, speculative=True)
    weights = make_rollout_weights(model, sampler)(params)
    out = generate(weights, prompts, sampler, options)
    return {
        "tokens": out.tokens.tolist(),
        "log_probs": out.policy_log_probs.tolist(),
        "accepted": out.accepted.tolist(),
    }


def update(model: Decoder, params: Params) -> dict[str, Any]:
    stage = PretrainStage(
        name="base",
        data="d",
        steps=1,
        rows_per_step=4,
        row_tokens=8,
        mtp_weight=0.3,
        optimizer=OptimizerSection(learning_rate=1.0),
    )
    batch = {"tokens": TOKENS, "positions": np.broadcast_to(np.arange(8, dtype=np.int32), (4, 8))}
    batch |= {"segment_ids": np.ones_like(TOKENS), "trained": np.ones(TOKENS.shape, bool)}
    batch = jax.device_put(batch, model.layout.sharding(("batch",)))
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_update(stage, model, optimizer))
    state, metrics = step(init_train_state(params, optimizer), batch)
    return {
        "losses": [float(metrics[name]) for name in ("loss", "mtp/loss")],
        "weights": np.asarray(state.params["prediction"]["join"]).ravel().tolist(),
    }


if __name__ == "__main__":
    print(json.dumps([main(*case) for case in json.loads(sys.argv[1])]))
