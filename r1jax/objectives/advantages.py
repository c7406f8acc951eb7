"""Group-relative advantages (DeepSeekMath, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class Advantages(NamedTuple):
    """zero_variance: the groups that teach nothing, as all their scored samples earned the same."""

    values: Float[Array, "prompts samples"]
    zero_variance: Bool[Array, " prompts"]


def group_advantages(
    rewards: Float[Array, "prompts samples"],
    *,
    scale: Literal["std", "none"] = "std",
    epsilon: float = 1e-6,
) -> Advantages:
    """A_i = (R_i - mean R) / std R over the samples of one prompt, in float32.

    A reward that is NaN (its verifier failed) takes no part: it is left out of the group's mean
    and std, and its advantage is 0. The std is the population's, as in the paper. Where all scored
    samples of a group earned the same, however many they are, the advantages are exactly 0.

    Args:
      rewards: the samples of one prompt are one row, so groups cannot mix.
      scale: `std` as published, `none` to only centre (Dr. GRPO, arXiv 2503.20783).
      epsilon: added to the std, so that nearly equal rewards do not explode.

    Raises:
      ValueError: rewards are not [prompts, samples].
    """
    if jnp.ndim(rewards) != 2:
        raise ValueError(
            f"rewards has shape {jnp.shape(rewards)}; expected [prompts, samples]: put the samples "
            "of a prompt in one row with rewards.reshape(-1, samples)"
        )
    scored = jnp.isfinite(rewards)
    kept = jnp.where(scored, rewards.astype(jnp.float32), 0.0)
    count = jnp.maximum(scored.sum(axis=1, keepdims=True), 1)
    mean = kept.sum(axis=1, keepdims=True) / count
    centred = jnp.where(scored, kept - mean, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count)
    values = centred / (std + epsilon) if scale == "std" else centred
    # Of equal rewards the mean is rounded, and so the std is not always 0.
    highest = jnp.max(jnp.where(scored, kept, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(scored, kept, jnp.inf), axis=1)
    equal = highest <= lowest
    return Advantages(jnp.where(equal[:, None], 0.0, values), equal)
