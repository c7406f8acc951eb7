"""Prompts and their samples: the sampler's input and output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.sampler.distribution import sample_keys
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key, UInt32


class Finish(IntEnum):
    """Why a sample ended: `LENGTH` means truncated."""

    LENGTH = 0
    EOS = 1
    STOP = 2


@struct.dataclass
class Prompts:
    """Right-padded prompts.

    ids: part of the keys.
    first_samples: the index of a prompt's first sample, part of the keys: further samples of a
        prompt, later or in the same batch, go on where the others ended.
    """

    tokens: Int[Array, "batch time"]
    lengths: Int[Array, " batch"]
    ids: UInt32[Array, " batch"]
    first_samples: Int[Array, " batch"] | int = 0


@struct.dataclass
class Samples:
    """Completions, right-padded with 0 beyond their lengths; `time` is max_new_tokens.

    tokens: a final EOS is included.
    lengths: sampled tokens, the EOS included.
    finish: see `Finish`.
    policy_log_probs: of each token under softmax(logits / temperature).
    sampling_log_probs: under the filtered distribution that was drawn from.
    drafted, accepted: tokens that the module for multi-token prediction drafted, and those of them
        that were accepted; None without it.
    experts, prompt_experts: the experts of each token of completions (`time` may be less) and
        prompts, for `TokenRows` to replay. None where they were not recorded.
    """

    tokens: Int[Array, "batch samples time"]
    lengths: Int[Array, "batch samples"]
    finish: Int[Array, "batch samples"]
    policy_log_probs: Float[Array, "batch samples time"]
    sampling_log_probs: Float[Array, "batch samples time"]
    drafted: Int[Array, "batch samples"] | None = None
    accepted: Int[Array, "batch samples"] | None = None
    experts: Int[Array, "batch samples time layers_k"] | None = None
    prompt_experts: Int[Array, "batch prompt_time layers_k"] | None = None


@jax.jit
def cut(
    samples: Samples, running: Bool[Array, "batch samples"], ends: Int[Array, "batch samples"]
) -> tuple[Samples, Bool[Array, "batch samples"]]:
    """End the samples that have a stop string (ends >= 0) after `ends` tokens."""
    stopped = (ends >= 0) & (ends <= samples.lengths)
    lengths = jnp.where(stopped, ends, samples.lengths)
    inside = jnp.arange(samples.tokens.shape[-1]) < lengths[..., None]
    shortened = replace(
        samples,
        tokens=jnp.where(inside, samples.tokens, 0),
        lengths=lengths,
        finish=jnp.where(stopped, Finish.STOP, samples.finish),
        policy_log_probs=jnp.where(inside, samples.policy_log_probs, 0.0),
        sampling_log_probs=jnp.where(inside, samples.sampling_log_probs, 0.0),
    )
    return shortened, running & ~stopped


def no_samples(batch: int, count: int, max_new_tokens: int, layout: Layout) -> Samples:
    """`count` samples of length 0 of each prompt, split over devices."""
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


def keys_of(
    prompts: Prompts, seed: UInt32[Array, ""], step: UInt32[Array, ""], count: int
) -> Key[Array, "batch samples"]:
    """Keys of the samples, from `sample_keys`."""
    firsts = jnp.broadcast_to(prompts.first_samples, (prompts.tokens.shape[0],))
    indices = firsts[:, None] + jnp.arange(count, dtype=jnp.int32)
    return sample_keys(seed, step, prompts.ids, indices)


# Given the tokens so far [N, t] and their lengths [N], the lengths at which stop strings end
# (-1: none occurs).
StopSearch = Callable[[np.ndarray, np.ndarray], np.ndarray]
