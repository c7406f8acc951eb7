"""Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp


class Advantages(NamedTuple):
    """values: float32 [prompts, samples].

    zero_variance: bool [prompts], the groups that teach nothing.
    """

    values: jax.Array
    zero_variance: jax.Array


def group_advantages(
    rewards: jax.Array,
    *,
    scale: Literal["std", "none"] = "std",
    epsilon: float = 1e-6,
) -> Advantages:
    """A_i = (R_i - mean R) / std R over the samples of one prompt.

    A reward that is NaN (its verifier failed) takes no part: it is left out of the group's mean
    and std, and its advantage is 0. The std is the population's, as in the paper.

    Args:
      rewards: float [prompts, samples]; the samples of one prompt are one row, so groups cannot
        mix.
      scale: `std` as published, `none` to only centre (Dr. GRPO, arXiv 2503.20783).
      epsilon: added to the std, so that nearly equal rewards do not explode.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards has shape {rewards.shape}; expected [prompts, samples]")
    scored = jnp.isfinite(rewards)
    kept = jnp.where(scored, rewards.astype(jnp.float32), 0.0)
    count = jnp.maximum(scored.sum(axis=1, keepdims=True), 1)
    mean = kept.sum(axis=1, keepdims=True) / count
    centred = jnp.where(scored, kept - mean, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count)
    values = centred / (std + epsilon) if scale == "std" else centred
    flat = std[:, 0] <= 1e-8
    return Advantages(jnp.where(flat[:, None], 0.0, values), flat)
