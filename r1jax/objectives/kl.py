"""Estimators of the KL divergence to the reference policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from r1jax.objectives.shapes import check_log_probs

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def k3_divergence(
    log_probs: Float[Array, "batch time"], reference_log_probs: Float[Array, "batch time"]
) -> Float[Array, "batch time"]:
    """KL(policy || reference) of each token: pi_ref / pi - log(pi_ref / pi) - 1.

    Schulman's estimate k3: unbiased for samples of the policy, and never negative (R1 paper, arXiv
    2501.12948, equation 2).

    Raises:
      ValueError: the shapes differ, or the log-probs are no floating-point numbers.
    """
    check_log_probs({"log_probs": log_probs, "reference_log_probs": reference_log_probs})
    gap = reference_log_probs - log_probs
    return jnp.expm1(gap) - gap
