"""The clipped policy-gradient loss of GRPO, token by token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from r1jax.objectives.kl import k3_divergence
from r1jax.settings.objective import GRPOConfig


class TokenTerms(NamedTuple):
    """Per token, float32 [batch, time]; `loss` is what is differentiated, the rest is shown."""

    loss: jax.Array
    ratio: jax.Array
    clipped: jax.Array
    kl: jax.Array


def token_terms(
    log_probs: jax.Array,
    advantages: jax.Array,
    *,
    config: GRPOConfig,
    old_log_probs: jax.Array | None = None,
    reference_log_probs: jax.Array | None = None,
    sampler_log_probs: jax.Array | None = None,
) -> TokenTerms:
    """-(min(r A, clip(r, 1 - low, 1 + high) A)) + beta k3, for each token (R1 paper, equation 1).

    Args:
      log_probs: [batch, time], of the policy that is trained.
      advantages: [batch] or [batch, time].
      old_log_probs: of the policy that sampled, as the trainer computes them. None: the batch is
        on policy, r = 1 in value (its gradient is the policy gradient).
      reference_log_probs: needed when config.kl_coefficient is not 0.
      sampler_log_probs: of the distribution that was really sampled from; used when
        config.importance_cap is set.
    """
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    old = jax.lax.stop_gradient(log_probs) if old_log_probs is None else old_log_probs
    ratio = jnp.exp(log_probs - old)
    clipped_ratio = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    objective = jnp.minimum(ratio * advantages, clipped_ratio * advantages)
    clipped = ratio * advantages > clipped_ratio * advantages
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        below = (advantages < 0) & (objective < floor)
        objective = jnp.where(below, floor, objective)
        clipped = clipped | below
    if config.importance_cap is not None and sampler_log_probs is not None:
        weight = jnp.minimum(jnp.exp(old - sampler_log_probs), config.importance_cap)
        objective = objective * jax.lax.stop_gradient(weight)
    loss = -objective
    kl = jnp.zeros_like(loss)
    if config.kl_coefficient:
        if reference_log_probs is None:
            raise ValueError(
                f"kl_coefficient = {config.kl_coefficient} needs reference_log_probs; "
                "pass them or set kl_coefficient to 0"
            )
        kl = k3_divergence(log_probs, reference_log_probs)
        loss = loss + config.kl_coefficient * kl
    return TokenTerms(loss, ratio, clipped.astype(jnp.float32), kl)
