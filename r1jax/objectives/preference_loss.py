"""What reward models learn from: pairs of responses, and responses labelled safe or unsafe.

Each loss is a weighted sum over rows; the weights are those of `normalisation.row_weights`.

The R1 paper (arXiv 2501.12948 v2) trains the helpful reward model with the pairwise loss, where it
scores only the final summary of a response, and the safety one point-wise, where it scores the
whole; both with a batch of 256, a learning rate of 6e-6, one epoch, and at most 8192 tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.objectives.shapes import PER_ROW, check_alike, check_floating

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Num

    Scalar = Float[Array, ""]


def pairwise_loss(
    chosen: Float[Array, " pairs"],
    rejected: Float[Array, " pairs"],
    weights: Float[Array, " pairs"],
) -> tuple[Scalar, dict[str, Scalar]]:
    """-log sigmoid(chosen - rejected), summed by weight.

    The negative log-likelihood of the preferences under the model of Bradley and Terry (1952), in
    which a response wins with probability sigmoid(difference of the scores); InstructGPT (arXiv
    2203.02155), equation 1. Neither it nor the R1 paper has a margin.

    Args:
      chosen, rejected: scores of the better and of the worse response.
      weights: of `row_weights` for the whole batch; what a pair of weight 0 holds does not matter.

    Returns:
      The loss, and sums by the same weights: `accuracy`, the share of pairs that are ranked right
      (an equal score counts a half, so that a constant model has 0.5), and `margin`, chosen -
      rejected.

    Raises:
      ValueError: the shapes differ.
    """
    scores = {"chosen": chosen, "rejected": rejected}
    check_alike(PER_ROW, {**scores, "weights": weights})
    check_floating(scores)
    counted = weights > 0
    margin = jnp.where(counted, chosen - rejected, 0.0)
    right = jnp.where(margin == 0, 0.5, (margin > 0).astype(jnp.float32))
    metrics = {"accuracy": jnp.sum(right * weights), "margin": jnp.sum(margin * weights)}
    return jnp.sum(jax.nn.softplus(-margin) * weights), metrics


def pointwise_loss(
    scores: Float[Array, " rows"],
    safe: Num[Array, " rows"] | Bool[Array, " rows"],
    weights: Float[Array, " rows"],
) -> tuple[Scalar, dict[str, Scalar]]:
    """Binary cross-entropy of "safe" with probability sigmoid(score), summed by weight.

    The R1 paper says point-wise and no more; the cross-entropy is the usual choice.

    Args:
      scores: above 0 means safe.
      safe: 1 for a response labelled safe, 0 for an unsafe one.
      weights: of `row_weights` for the whole batch; what a row of weight 0 holds does not matter.

    Returns:
      The loss, and sums by the same weights: `accuracy`, the share of rows on the right side of 0
      (a score of 0 counts a half), and `safe`, the share of rows labelled safe, which a model that
      always says "safe" is right about.

    Raises:
      ValueError: the shapes differ.
    """
    check_alike(PER_ROW, {"scores": scores, "safe": safe, "weights": weights})
    check_floating({"scores": scores})
    counted = weights > 0
    safe = jnp.where(counted, safe.astype(jnp.float32), 0.0)
    # log sigmoid(s) = -softplus(-s): an unsafe row is a safe one with the other sign.
    signed = jnp.where(counted, jnp.where(safe > 0, scores, -scores), 0.0)
    right = jnp.where(signed == 0, 0.5, (signed > 0).astype(jnp.float32))
    metrics = {"accuracy": jnp.sum(right * weights), "safe": jnp.sum(safe * weights)}
    return jnp.sum(jax.nn.softplus(-signed) * weights), metrics
