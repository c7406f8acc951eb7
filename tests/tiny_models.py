"""Tiny random models and rows that several test files use, and a fast `jit` for tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models import Decoder, ModelConfig, TokenRows, declare, decode
from r1jax.models.decoder import next_tokens
from r1jax.models.kv_cache import KVCache, PromptCache
from r1jax.models.parameters import Params, is_spec

# Each program runs once: spend no time on LLVM's optimisations. XLA's own passes are the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def random_params(config: ModelConfig) -> Params:
    """Weights whose norms and biases have left their defaults, so that each one counts."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: jnp.asarray(
            0.3 * rng.standard_normal(spec.shape, np.float32) + (spec.init == "ones")
        ),
        declare(config),
        is_leaf=is_spec,
    )


def positions_of(tokens: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)


def whole_rows(tokens: np.ndarray) -> TokenRows:
    """One document a row, without padding."""
    return TokenRows(tokens, positions_of(tokens), np.ones_like(tokens))


def decode_one(
    params: Params,
    tokens: np.ndarray,
    step: np.ndarray,
    prompts: PromptCache,
    cache: KVCache,
    model: Decoder,
) -> tuple[jax.Array, KVCache]:
    """Activations [batch, samples, hidden] of the step-th new token of every sample."""
    new = next_tokens(tokens, step, prompts, cache, model)
    hidden, cache = decode(params, new, prompts, cache, model)
    return hidden[:, :, 0], cache
