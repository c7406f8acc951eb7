"""What remat keeps, counted in what JAX keeps; and when `auto` keeps it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import whole_rows

from r1jax.models import (
    Decoder,
    Execution,
    LatentAttention,
    ModelConfig,
    abstract_params,
)
from r1jax.models.config import RematPolicy
from r1jax.models.decoder import run_rows
from r1jax.models.remat import kept_values, remat_policy
from r1jax.programs.program import TrainBatch, remat_limits
from r1jax.sharding import single_device

ROWS, TIME = 3, 16
DENSE = ModelConfig("qwen2", 97, 24, 40, 2, 4, 2, 6)
LATENT = LatentAttention(18, 8, 4, 2, 5)
DEEPSEEK = ModelConfig("deepseek_v3", 97, 24, 40, 3, 4, 4, 6, latent=LATENT)


def decoder(config: ModelConfig, remat: RematPolicy | Literal["auto"], **settings: int) -> Decoder:
    execution = Execution(compute_dtype=jnp.float32, remat=remat, **settings)  # type: ignore[arg-type]
    return Decoder(config, execution, single_device())


def kept_by_jax(config: ModelConfig, remat: RematPolicy) -> float:
    """Numbers of a token that the backward pass of the layers reads, weights left out."""
    model = decoder(config, remat)
    rows = whole_rows(np.zeros((ROWS, TIME), np.int32))
    weights = abstract_params(config, model.layout, jnp.float32)
    x = jax.ShapeDtypeStruct((ROWS, TIME, config.hidden_size), jnp.float32)

    def kept(weights: object, x: jax.Array) -> object:
        def layers(weights: object, x: jax.Array) -> jax.Array:
            return run_rows(weights, x, rows, model, tuple(config.stacks)).hidden  # type: ignore[arg-type]

        return jax.vjp(layers, weights, x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, weights, x))
    by_token = [leaf for leaf in leaves if math.prod(leaf.shape) % (ROWS * TIME) == 0]
    of_weights = [leaf.shape for leaf in jax.tree.leaves(weights)]
    floats = [x for x in by_token if x.dtype == jnp.float32 and x.shape not in of_weights]
    return sum(math.prod(leaf.shape) for leaf in floats) / (ROWS * TIME)


@pytest.mark.parametrize("config", [DENSE, DEEPSEEK])
def test_the_estimate_is_what_jax_keeps(config: ModelConfig) -> None:
    full, dots = kept_by_jax(config, "full"), kept_by_jax(config, "dots")
    small = 2 * config.rope_dim  # cosines and sines, once for all layers
    assert full == pytest.approx(kept_values(config, "full"), abs=small)
    # Attention that is no kernel is computed again.
    attention = config.num_hidden_layers * config.num_attention_heads * config.v_head_dim
    assert dots == pytest.approx(kept_values(config, "dots") - attention, abs=small)
    assert kept_values(config, "none") > kept_values(config, "dots") > kept_values(config, "full")


def test_auto_keeps_products_where_they_fit() -> None:
    model = decoder(DENSE, "auto")
    assert remat_policy(model, ROWS, TIME) == "full"  # the memory is not known

    def policy(memory: int, rows: int = ROWS) -> RematPolicy:
        return remat_policy(decoder(DENSE, "auto", device_memory=memory), rows, TIME)

    enough = next(2**n for n in range(40) if policy(2**n) == "dots")
    assert policy(enough // 2) == "full"
    weights = jax.tree.leaves(abstract_params(DENSE, model.layout, jnp.float32))
    # More than weights, gradients, moments and the reference's take, and what is kept.
    assert enough > 24 * sum(leaf.size for leaf in weights)
    assert enough > 4 * ROWS * TIME * kept_values(DENSE, "dots")
    assert policy(enough, 100 * ROWS) == "full" and policy(100 * enough, 100 * ROWS) == "dots"
    chosen = replace(model, execution=replace(model.execution, remat="none"))
    assert remat_policy(chosen, 10**9, TIME) == "none"


def test_what_auto_is_can_be_read() -> None:
    batch = TrainBatch({}, 8 * ROWS, TIME, micro_batches=8)
    (line,) = remat_limits(decoder(DENSE, "auto", device_memory=10**12), batch)
    assert line == f"remat: auto is dots for micro-batches of {ROWS} rows of {TIME} tokens"
    assert remat_limits(decoder(DENSE, "dots"), batch) == ()
