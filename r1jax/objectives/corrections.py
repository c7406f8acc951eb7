"""Weights for the gap between the trainer's log-probs and those of what was really sampled from.

A sampler computes in other precision, other batches or older weights. The weight of a token is
w = pi_old / pi_sampler, where pi_old is the sampling policy as the trainer computes it; that of a
sequence is the product over its trained tokens. All are without gradient, and raise ValueError, as
they are traced, for arrays of other shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from r1jax.objectives.sequences import sequence_sum
from r1jax.objectives.shapes import check_log_probs

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from r1jax.objectives.sequences import Mask, SegmentIds

    Tokens = Float[Array, "batch time"]


def importance_weight(old_log_probs: Tokens, sampler_log_probs: Tokens, cap: float) -> Tokens:
    """min(pi_old / pi_sampler, cap): truncated importance sampling (IMPALA, arXiv 1802.01561,
    section 4.1)."""
    weight = jnp.minimum(jnp.exp(_log_weight(old_log_probs, sampler_log_probs)), cap)
    return jax.lax.stop_gradient(weight)


def masked_importance_weight(
    old_log_probs: Tokens, sampler_log_probs: Tokens, *, floor: float, cap: float
) -> Tokens:
    """pi_old / pi_sampler where that is in [floor, cap], else 0.

    A token whose two log-probs are too far apart teaches nothing (IcePop, in Ring-1T, arXiv
    2510.18855, with [0.5, 5]), where `importance_weight` still counts it by the cap.
    """
    return _masked(jnp.exp(_log_weight(old_log_probs, sampler_log_probs)), floor, cap)


def sequence_importance_weight(
    old_log_probs: Tokens,
    sampler_log_probs: Tokens,
    mask: Mask,
    segment_ids: SegmentIds | None = None,
    *,
    cap: float,
) -> Tokens:
    """min(prod_t pi_old / pi_sampler, cap), one for all tokens of a sequence.

    The product is the weight without bias, where a token's alone leaves out how likely the tokens
    before it were; it varies more, the longer the sequence.
    """
    gap = _log_weight(old_log_probs, sampler_log_probs)
    weight = jnp.minimum(jnp.exp(sequence_sum(gap, mask, segment_ids)), cap)
    return jax.lax.stop_gradient(weight)


def masked_sequence_importance_weight(
    old_log_probs: Tokens,
    sampler_log_probs: Tokens,
    mask: Mask,
    segment_ids: SegmentIds | None = None,
    *,
    floor: float,
    cap: float,
) -> Tokens:
    """prod_t pi_old / pi_sampler where that is in [floor, cap], else 0: whole sequences are left
    out."""
    gap = _log_weight(old_log_probs, sampler_log_probs)
    return _masked(jnp.exp(sequence_sum(gap, mask, segment_ids)), floor, cap)


def _log_weight(old_log_probs: Tokens, sampler_log_probs: Tokens) -> Tokens:
    check_log_probs({"old_log_probs": old_log_probs, "sampler_log_probs": sampler_log_probs})
    return old_log_probs - sampler_log_probs


def _masked(weight: Tokens, floor: float, cap: float) -> Tokens:
    inside = (weight >= floor) & (weight <= cap)
    return jax.lax.stop_gradient(jnp.where(inside, weight, 0.0))
