"""What a process reward model learns from: steps labelled right or wrong.

The loss is a weighted sum over tokens, of which those count that end a labelled step; the weights
are those of `normalisation.token_weights`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.objectives.shapes import PER_TOKEN, check_alike, check_floating

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Num

    Scalar = Float[Array, ""]


def right_logits(logits: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """The logit of "right" against "wrong", from logits of both labels: its sigmoid is the softmax
    over the two."""
    return logits[..., 1] - logits[..., 0]


def step_loss(
    logits: Float[Array, "batch time 2"],
    labels: Num[Array, "batch time"],
    weights: Float[Array, "batch time"],
) -> tuple[Scalar, dict[str, Scalar]]:
    """Cross-entropy of the labels "wrong" and "right" at the ends of steps, summed by weight.

    -(y log p + (1 - y) log(1 - p)), p = softmax(logits)[right]: Lightman et al. 2023 (arXiv
    2305.20050, section 2.6) and, with y from continuations of the step, Wang et al. 2023 (arXiv
    2312.08935, section 3).

    Args:
      logits: of wrong and of right.
      labels: y in 0..1 where a step ends.
      weights: of `token_weights` for the whole batch, 0 where no labelled step ends; what labels
        and logits are there does not matter.

    Returns:
      The loss, and sums by the same weights: `accuracy`, the share of steps on the right side of
      one half (a step at one half counts a half), and `right`, the share of labels of one half or
      more, which a model that always says "right" is right about.

    Raises:
      ValueError: the shapes differ.
    """
    if logits.shape[-1:] != (2,):
        raise ValueError(f"logits has shape {logits.shape}; expected [batch, time, 2]")
    check_floating({"logits": logits})
    counted = weights > 0
    scores = jnp.where(counted, right_logits(logits).astype(jnp.float32), 0.0)
    check_alike(PER_TOKEN, {"logits[..., 0]": scores, "labels": labels, "weights": weights})
    labels = jnp.where(counted, labels.astype(jnp.float32), 0.0)
    losses = labels * jax.nn.softplus(-scores) + (1 - labels) * jax.nn.softplus(scores)
    right = labels >= 0.5
    agrees = jnp.where(scores == 0, 0.5, ((scores > 0) == right).astype(jnp.float32))
    metrics = {"accuracy": jnp.sum(agrees * weights), "right": jnp.sum(right * weights)}
    return jnp.sum(losses * weights), metrics
