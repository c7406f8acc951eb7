"""What a critic learns: the returns of tokens, of which its values are estimates."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from r1jax.objectives.shapes import PER_TOKEN, check_alike, check_floating

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from r1jax.objectives.sequences import Mask

    Tokens = Float[Array, "batch time"]


class ValueLoss(NamedTuple):
    """Of each token; clipped: the loss is that of the clipped value, and has no gradient."""

    loss: Tokens
    clipped: Bool[Array, "batch time"]


def value_loss(
    values: Tokens,
    returns: Tokens,
    old_values: Tokens | None = None,
    *,
    clip: float | None = None,
) -> ValueLoss:
    """max((V - R)^2, (V_c - R)^2) / 2 with V_c = V, bounded to V_old +- clip: the value loss
    of PPO2 (OpenAI Baselines; Engstrom et al. 2020, arXiv 2005.12729, section 3).

    Without `clip` it is (V - R)^2 / 2 (GAE, arXiv 1506.02438, section 5). Its gradient with
    respect to V is V - R, or 0 where V has moved further than `clip` from V_old, towards R.

    Args:
      returns: what the values estimate, without gradient; of GAE, A + V_old.
      old_values: of the critic before the updates of a phase; read with `clip` alone.

    Raises:
      ValueError: arrays of other shapes or dtypes, or `clip` without `old_values`.
    """
    arrays = {"values": values, "returns": returns, "old_values": old_values}
    check_alike(PER_TOKEN, arrays)
    check_floating(arrays)
    squares = jnp.square(values - returns)
    if clip is None:
        return ValueLoss(squares / 2, jnp.zeros(values.shape, bool))
    if old_values is None:
        raise ValueError(f"clip = {clip} needs old_values, those before the updates of a phase")
    near = jnp.clip(values, old_values - clip, old_values + clip)
    of_clipped = jnp.square(near - returns)
    return ValueLoss(jnp.maximum(squares, of_clipped) / 2, of_clipped > squares)


def explained_variance(values: Tokens, returns: Tokens, mask: Mask) -> Float[Array, ""]:
    """1 - Var(R - V) / Var(R) over trained tokens: 1 for a critic that knows all, 0 for one that
    says the same of every token; may be negative. 0 where the returns are equal.

    Raises:
      ValueError: arrays of other shapes.
    """
    check_alike(PER_TOKEN, {"values": values, "returns": returns, "mask": mask})
    trained = mask > 0
    count = jnp.maximum(trained.sum(), 1)

    def variance(x: Tokens) -> Float[Array, ""]:
        mean = jnp.sum(jnp.where(trained, x, 0)) / count
        return jnp.sum(jnp.where(trained, jnp.square(x - mean), 0)) / count

    highest = jnp.max(jnp.where(trained, returns, -jnp.inf))
    lowest = jnp.min(jnp.where(trained, returns, jnp.inf))
    whole = variance(returns)
    share = variance(returns - values) / jnp.where(whole > 0, whole, 1)
    return jnp.where((highest > lowest) & (whole > 0), 1 - share, 0)
