"""The clipped policy-gradient loss of GRPO, token by token.

`token_terms` is the whole loss; the functions before it are its parts, each usable alone. All
raise ValueError, as they are traced, for arrays of other shapes: an advantage is one for each row,
[batch], or one for each token, [batch, time]; everything else is [batch, time].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.objectives.kl import k3_divergence
from r1jax.objectives.shapes import PER_TOKEN, check_advantages, check_alike, check_log_probs
from r1jax.settings.objective import GRPOConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    Tokens = Float[Array, "batch time"]
    Advantages = Float[Array, " batch"] | Float[Array, "batch time"]


class Surrogate(NamedTuple):
    """objective: what is maximised. clipped: where its gradient is 0."""

    objective: Tokens
    clipped: Bool[Array, "batch time"]


def probability_ratio(log_probs: Tokens, old_log_probs: Tokens | None = None) -> Tokens:
    """r = pi / pi_old, of the policy that is trained and the one that sampled (PPO, arXiv
    1707.06347, section 3).

    None: they are the same. Then r is 1, and its gradient is the one of log pi.
    """
    check_log_probs({"log_probs": log_probs, "old_log_probs": old_log_probs})
    old = jax.lax.stop_gradient(log_probs) if old_log_probs is None else old_log_probs
    return jnp.exp(log_probs - old)


def clipped_surrogate(
    ratio: Tokens, advantages: Advantages, *, clip_low: float, clip_high: float
) -> Surrogate:
    """min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347, equation 7).

    Two bounds as in DAPO (arXiv 2503.14476, equation 10).
    """
    advantages = _per_token(advantages, ratio)
    clipped_ratio = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    objective = jnp.minimum(ratio * advantages, clipped_ratio * advantages)
    return Surrogate(objective, ratio * advantages > clipped_ratio * advantages)


def dual_clip(surrogate: Surrogate, advantages: Advantages, factor: float) -> Surrogate:
    """max(surrogate, factor A) where A < 0: a bound on the loss of a sample whose ratio exploded
    (arXiv 1912.09729, equation 5).

    Args:
      factor: above 1.
    """
    advantages = _per_token(advantages, surrogate.objective)
    floor = factor * advantages
    below = (advantages < 0) & (surrogate.objective < floor)
    return Surrogate(jnp.where(below, floor, surrogate.objective), surrogate.clipped | below)


def importance_weight(old_log_probs: Tokens, sampler_log_probs: Tokens, cap: float) -> Tokens:
    """min(pi_old / pi_sampler, cap), without gradient.

    Truncated importance sampling (IMPALA, arXiv 1802.01561, section 4.1), here for the gap between
    the trainer's log-probs and those of the distribution that was sampled from.
    """
    check_log_probs({"old_log_probs": old_log_probs, "sampler_log_probs": sampler_log_probs})
    weight = jnp.minimum(jnp.exp(old_log_probs - sampler_log_probs), cap)
    return jax.lax.stop_gradient(weight)


def masked_importance_weight(
    old_log_probs: Tokens, sampler_log_probs: Tokens, *, floor: float, cap: float
) -> Tokens:
    """pi_old / pi_sampler where that is in [floor, cap], else 0; without gradient.

    A token whose two log-probs are too far apart teaches nothing (IcePop, in Ring-1T, arXiv
    2510.18855), where `importance_weight` still counts it by the cap.
    """
    check_log_probs({"old_log_probs": old_log_probs, "sampler_log_probs": sampler_log_probs})
    weight = jnp.exp(old_log_probs - sampler_log_probs)
    inside = (weight >= floor) & (weight <= cap)
    return jax.lax.stop_gradient(jnp.where(inside, weight, 0.0))


class TokenTerms(NamedTuple):
    """Of each token; `loss` is what is differentiated, the rest is shown."""

    loss: Tokens
    ratio: Tokens
    clipped: Tokens
    kl: Tokens


def token_terms(
    log_probs: Tokens,
    advantages: Advantages,
    *,
    config: GRPOConfig,
    old_log_probs: Tokens | None = None,
    reference_log_probs: Tokens | None = None,
    sampler_log_probs: Tokens | None = None,
) -> TokenTerms:
    """-w min(r A, clip(r, 1 - low, 1 + high) A) + beta k3 (R1 paper, arXiv 2501.12948, equation 1).

    Args:
      log_probs: of the policy that is trained.
      old_log_probs: of the policy that sampled, as the trainer computes them. None: the batch is
        on policy.
      reference_log_probs: needed when config.kl_coefficient is not 0.
      sampler_log_probs: of the distribution that was really sampled from, for the weight w; used
        when config.importance_cap is set.
    """
    check_log_probs(
        {
            "log_probs": log_probs,
            "old_log_probs": old_log_probs,
            "reference_log_probs": reference_log_probs,
            "sampler_log_probs": sampler_log_probs,
        }
    )
    check_advantages(advantages, "log_probs", log_probs)
    ratio = probability_ratio(log_probs, old_log_probs)
    surrogate = clipped_surrogate(
        ratio, advantages, clip_low=config.clip_low, clip_high=config.clip_high
    )
    if config.dual_clip is not None:
        surrogate = dual_clip(surrogate, advantages, config.dual_clip)
    objective = surrogate.objective
    if config.importance_cap is not None and sampler_log_probs is not None:
        old = jax.lax.stop_gradient(log_probs) if old_log_probs is None else old_log_probs
        cap = config.importance_cap
        if config.importance_correction == "masked":
            weight = masked_importance_weight(
                old, sampler_log_probs, floor=config.importance_floor, cap=cap
            )
        else:
            weight = importance_weight(old, sampler_log_probs, cap)
        objective = objective * weight
    loss, kl = -objective, jnp.zeros_like(objective)
    if config.kl_coefficient:
        if reference_log_probs is None:
            raise ValueError(
                f"kl_coefficient = {config.kl_coefficient} needs reference_log_probs; "
                "pass them or set kl_coefficient to 0"
            )
        kl = k3_divergence(log_probs, reference_log_probs)
        loss = loss + config.kl_coefficient * kl
    return TokenTerms(loss, ratio, surrogate.clipped.astype(jnp.float32), kl)


def _per_token(advantages: Advantages, ratio: Tokens) -> Tokens:
    """Advantages that broadcast over the tokens of their rows and nothing else."""
    check_alike(PER_TOKEN, {"ratio": ratio})
    check_advantages(advantages, "ratio", ratio)
    return advantages[:, None] if jnp.ndim(advantages) == 1 else advantages
