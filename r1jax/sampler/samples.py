"""Prompts, their samples, and what both ways of sampling do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.sampler.distribution import sample_keys
from r1jax.sharding import Layout


class Finish(IntEnum):
    """Why a sample ended: `LENGTH` means truncated."""

    LENGTH = 0
    EOS = 1
    STOP = 2


@struct.dataclass
class Prompts:
    """Right-padded prompts.

    tokens: int32 [batch, time]. lengths: int32 [batch]. ids: uint32 [batch], part of the keys.
    first_samples: int32 [batch] or a scalar, the index of a prompt's first sample, part of the
        keys: more samples of a prompt, later or in the same batch, go on where the others ended.
    """

    tokens: Any
    lengths: Any
    ids: Any
    first_samples: Any = 0


@struct.dataclass
class Samples:
    """Completions, [batch, samples, ...], right-padded with 0 beyond their lengths.

    tokens: int32 [..., max_new_tokens]; a final EOS is included.
    lengths: int32, sampled tokens, the EOS included.
    finish: int32, see `Finish`.
    policy_log_probs: float32, of each token under softmax(logits / temperature).
    sampling_log_probs: float32, under the filtered distribution that was drawn from.
    drafted, accepted: int32 [batch, samples], tokens that the module for multi-token prediction
        drafted, and those of them that were kept; None without it.
    experts: int [..., max_new_tokens or less, layers * k], the experts that each token chose, and
        prompt_experts [batch, prompt_time, layers * k], those of the prompts' tokens: for
        `forward_routed` to replay. None where they were not recorded.
    """

    tokens: Any
    lengths: Any
    finish: Any
    policy_log_probs: Any
    sampling_log_probs: Any
    drafted: Any = None
    accepted: Any = None
    experts: Any = None
    prompt_experts: Any = None


@jax.jit
def cut(samples: Samples, running: jax.Array, ends: jax.Array) -> tuple[Samples, jax.Array]:
    """End the samples in which a stop string was found (ends >= 0) after `ends` tokens."""
    found = (ends >= 0) & (ends <= samples.lengths)
    lengths = jnp.where(found, ends, samples.lengths)
    inside = jnp.arange(samples.tokens.shape[-1]) < lengths[..., None]
    shortened = replace(
        samples,
        tokens=jnp.where(inside, samples.tokens, 0),
        lengths=lengths,
        finish=jnp.where(found, Finish.STOP, samples.finish),
        policy_log_probs=jnp.where(inside, samples.policy_log_probs, 0.0),
        sampling_log_probs=jnp.where(inside, samples.sampling_log_probs, 0.0),
    )
    return shortened, running & ~found


def no_samples(batch: int, count: int, max_new_tokens: int, layout: Layout) -> Samples:
    """Nothing yet of `count` samples of each prompt, split over devices as they will be."""
    shape = (batch, count)
    row = (*shape, max_new_tokens)

    def over_batch(leaf: jax.Array) -> jax.Array:
        return layout.constrain(leaf, ("batch", "sample", *(None,) * (leaf.ndim - 2)))

    return Samples(
        tokens=over_batch(jnp.zeros(row, jnp.int32)),
        lengths=over_batch(jnp.zeros(shape, jnp.int32)),
        finish=over_batch(jnp.full(shape, Finish.LENGTH, jnp.int32)),
        policy_log_probs=over_batch(jnp.zeros(row, jnp.float32)),
        sampling_log_probs=over_batch(jnp.zeros(row, jnp.float32)),
    )


def keys_of(prompts: Prompts, seed: jax.Array, rollout: jax.Array, count: int) -> jax.Array:
    """Keys [batch, count] of the samples, from `sample_keys`."""
    firsts = jnp.broadcast_to(prompts.first_samples, (prompts.tokens.shape[0],))
    indices = firsts[:, None] + jnp.arange(count, dtype=jnp.int32)
    return sample_keys(seed, rollout, prompts.ids, indices)


# Given the tokens so far [N, t] and their lengths [N], the lengths at which stop strings end
# (-1: none occurs).
StopSearch = Callable[[np.ndarray, np.ndarray], np.ndarray]
