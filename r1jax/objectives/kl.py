"""Estimators of the KL divergence to the reference policy, and their gradients.

Schulman's k1, k2 and k3 estimate KL(pi || pi_ref) from a token that pi drew. Of the value k1 and
k3 are unbiased. As a loss, what counts is the gradient, and that is another question (arXiv
2510.01555, section 4): that of KL is E[k1 grad log pi].

- in the loss, as published: k2 has this gradient, on policy; k3 (GRPO) is its first-order
  approximation; k1 has the gradient of log pi, whose mean is 0: it penalises nothing.
- in the loss, weighted by r = pi / pi_old (`weighted_divergence`): all three have it, off policy,
  too. For k3 this is DeepSeek-V3.2's form (arXiv 2512.02556, equation 7).
- in the reward, subtracted without gradient: k1 has it (PPO, RLOO, REINFORCE++); k2 and k3 are
  other penalties.

All raise ValueError, as they are traced, for arrays of other shapes, or of whole numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from r1jax.objectives.shapes import PER_TOKEN, check_alike, check_log_probs

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Tokens = Float[Array, "batch time"]

Estimator = Literal["k1", "k2", "k3"]


def k1_divergence(log_probs: Tokens, reference_log_probs: Tokens) -> Tokens:
    """log(pi / pi_ref) of each token: unbiased; may be negative."""
    check_log_probs({"log_probs": log_probs, "reference_log_probs": reference_log_probs})
    return log_probs - reference_log_probs


def k2_divergence(log_probs: Tokens, reference_log_probs: Tokens) -> Tokens:
    """(log(pi / pi_ref))^2 / 2 of each token: its gradient is that of KL on average."""
    return jnp.square(k1_divergence(log_probs, reference_log_probs)) / 2


def k3_divergence(log_probs: Tokens, reference_log_probs: Tokens) -> Tokens:
    """pi_ref / pi - log(pi_ref / pi) - 1 of each token: unbiased, and never negative (R1 paper,
    arXiv 2501.12948, equation 2)."""
    check_log_probs({"log_probs": log_probs, "reference_log_probs": reference_log_probs})
    gap = reference_log_probs - log_probs
    return jnp.expm1(gap) - gap


def divergence(log_probs: Tokens, reference_log_probs: Tokens, estimator: Estimator) -> Tokens:
    """The estimate of that name."""
    by_name = {"k1": k1_divergence, "k2": k2_divergence, "k3": k3_divergence}
    return by_name[estimator](log_probs, reference_log_probs)


def weighted_divergence(
    ratio: Tokens, log_probs: Tokens, reference_log_probs: Tokens, estimator: Estimator
) -> Tokens:
    """r k1, sg[r] k2 or r k3, whose gradients are all r k1 grad log pi on average, that of KL for
    tokens that pi_old drew.

    Through r comes k_n grad log pi; with that of k_n itself it makes k1 for k3, and for k1, and not
    for k2, whose gradient alone is k1 grad log pi.

    Args:
      ratio: r = pi / pi_old of each token, with its gradient.
    """
    check_alike(PER_TOKEN, {"ratio": ratio, "log_probs": log_probs})
    weight = jax.lax.stop_gradient(ratio) if estimator == "k2" else ratio
    return weight * divergence(log_probs, reference_log_probs, estimator)
