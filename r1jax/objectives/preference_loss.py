"""What reward models learn from: pairs of responses, and responses labelled safe or unsafe.

Each loss is a weighted sum over rows; the weights are those of `normalisation.row_weights`.

The R1 paper (arXiv 2501.12948 v2) trains the helpful reward model with the pairwise loss, where it
scores only the final summary of a response, and the safety one point-wise, where it scores the
whole; both with a batch of 256, a learning rate of 6e-6, one epoch, and at most 8192 tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


def pairwise_loss(
    chosen: jax.Array, rejected: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Metrics]:
    """-log sigmoid(chosen - rejected), summed by weight.

    The negative log-likelihood of the preferences under the model of Bradley and Terry (1952), in
    which a response wins with probability sigmoid(difference of the scores); InstructGPT (arXiv
    2203.02155), equation 1. Neither it nor the R1 paper has a margin.

    Args:
      chosen, rejected: float32 [pairs], scores of the better and of the worse response.
      weights: [pairs], of `row_weights` for the whole batch; what a pair of weight 0 holds does
        not matter.

    Returns:
      The loss, and sums by the same weights: `accuracy`, the share of pairs that are ranked right
      (an equal score counts a half, so that a constant model has 0.5), and `margin`, chosen -
      rejected.
    """
    counted = weights > 0
    margin = jnp.where(counted, chosen - rejected, 0.0)
    right = jnp.where(margin == 0, 0.5, (margin > 0).astype(jnp.float32))
    metrics = {"accuracy": jnp.sum(right * weights), "margin": jnp.sum(margin * weights)}
    return jnp.sum(jax.nn.softplus(-margin) * weights), metrics


def pointwise_loss(
    scores: jax.Array, safe: jax.Array, weights: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Binary cross-entropy of "safe" with probability sigmoid(score), summed by weight.

    The R1 paper says point-wise and no more; the cross-entropy is the usual choice.

    Args:
      scores: float32 [rows]; above 0 means safe.
      safe: bool or float [rows], 1 for a response labelled safe, 0 for an unsafe one.
      weights: [rows], of `row_weights` for the whole batch; what a row of weight 0 holds does not
        matter.

    Returns:
      The loss, and sums by the same weights: `accuracy`, the share of rows on the right side of 0
      (a score of 0 counts a half), and `safe`, the share of rows labelled safe, which a model that
      always says "safe" is right about.
    """
    counted = weights > 0
    safe = jnp.where(counted, safe.astype(jnp.float32), 0.0)
    # log sigmoid(s) = -softplus(-s): an unsafe row is a safe one with the other sign.
    signed = jnp.where(counted, jnp.where(safe > 0, scores, -scores), 0.0)
    right = jnp.where(signed == 0, 0.5, (signed > 0).astype(jnp.float32))
    metrics = {"accuracy": jnp.sum(right * weights), "safe": jnp.sum(safe * weights)}
    return jnp.sum(jax.nn.softplus(-signed) * weights), metrics
