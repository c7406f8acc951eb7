"""Estimators of the KL divergence to the reference policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def k3_divergence(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) per token: pi_ref/pi - log(pi_ref/pi) - 1.

    Unbiased for samples of the policy and never negative (R1 paper, equation 2).
    """
    gap = reference - log_probs
    return jnp.expm1(gap) - gap
