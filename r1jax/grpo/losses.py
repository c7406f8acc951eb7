"""The GRPO objective, token by token.

The loss is a weighted sum over tokens, with weights that are computed once from the masks of the
whole batch. Micro-batches then simply add up, to exactly the full batch's loss and gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Normalisation = Literal["sequence_mean", "token_mean", "constant"]


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of the objective; each field names its source.

    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high]. The R1 paper
        uses 10 for R1 and does not report it for R1-Zero; 0.2 is PPO's. Apart: DAPO, 2503.14476.
    dual_clip: for negative advantages the term is at least dual_clip * A (1912.09729); None: off.
    kl_coefficient: beta of the k3 penalty to the reference (R1: 0.001); 0 needs no reference.
    normalisation: `sequence_mean` 1/N sum_i 1/|o_i| sum_t (DeepSeekMath), `token_mean`
        sum / tokens (DAPO), `constant` sum / (N * constant_length) (Dr. GRPO, 2503.20783).
    constant_length: tokens; needed by `constant`.
    advantage_scale: `std` (GRPO) or `none` (Dr. GRPO).
    importance_cap: truncated importance sampling for the gap between the sampler and the trainer:
        each token's term is weighted by min(pi_old / pi_sampler, cap). None: off.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coefficient: float = 0.001
    normalisation: Normalisation = "sequence_mean"
    constant_length: int | None = None
    advantage_scale: Literal["std", "none"] = "std"
    importance_cap: float | None = 2.0

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "kl_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip = {self.dual_clip}: must be above 1, or null for off")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"importance_cap = {self.importance_cap}: must be positive, or null")
        if (self.normalisation == "constant") != (self.constant_length is not None):
            raise ValueError(
                f"normalisation = {self.normalisation!r} with constant_length = "
                f"{self.constant_length}: constant_length belongs to normalisation 'constant'"
            )
        if self.constant_length is not None and self.constant_length < 1:
            raise ValueError(f"constant_length = {self.constant_length}: must be at least 1")


def token_weights(
    mask: jax.Array,
    normalisation: Normalisation,
    *,
    constant_length: int | None = None,
    lengths: jax.Array | None = None,
    sequences: jax.Array | None = None,
) -> jax.Array:
    """How much each token counts; the loss is the weighted *sum* of the tokens' terms.

    Args:
      mask: bool or float [batch, time], 1 where a token is trained. A sequence whose row is all 0
        (truncated, unscored) counts neither above nor below the fraction bar.
      normalisation: see `GRPOConfig`.
      lengths: [batch, time] trained tokens of the sequence a token belongs to; default: the row's
        sum (one sequence a row). Give it, and `sequences`, for packed rows.
      sequences: scalar number of trained sequences; default: rows with a trained token.

    Returns:
      float32 [batch, time].
    """
    mask = mask.astype(jnp.float32)
    rows = mask.sum(axis=1, keepdims=True)
    lengths = rows if lengths is None else lengths
    count = (rows > 0).sum() if sequences is None else sequences
    count = jnp.maximum(count, 1).astype(jnp.float32)
    if normalisation == "sequence_mean":
        return mask / jnp.maximum(lengths, 1) / count
    if normalisation == "token_mean":
        return mask / jnp.maximum(mask.sum(), 1)
    if constant_length is None:
        raise ValueError("normalisation 'constant' needs constant_length")
    return mask / (count * constant_length)


def k3_divergence(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy || reference) per token: pi_ref/pi - log(pi_ref/pi) - 1.

    Unbiased for samples of the policy and never negative (R1 paper, equation 2).
    """
    gap = reference - log_probs
    return jnp.expm1(gap) - gap


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
