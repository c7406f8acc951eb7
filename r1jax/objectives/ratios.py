"""The log of the ratio between the policy that is trained and the one that sampled.

Each function gives log r for each token, [batch, time]; r is its `jnp.exp`. Without
`old_log_probs` the batch is on policy: r is 1, and its gradient is the one of log pi. All raise
ValueError, as they are traced, for arrays of other shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from r1jax.objectives.sequences import sequence_mean
from r1jax.objectives.shapes import check_log_probs

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from r1jax.objectives.sequences import Mask, SegmentIds

    Tokens = Float[Array, "batch time"]


def log_ratio(log_probs: Tokens, old_log_probs: Tokens | None = None) -> Tokens:
    """log(pi / pi_old) of each token (PPO, arXiv 1707.06347, section 3)."""
    check_log_probs({"log_probs": log_probs, "old_log_probs": old_log_probs})
    old = jax.lax.stop_gradient(log_probs) if old_log_probs is None else old_log_probs
    return log_probs - old


def sequence_log_ratio(
    log_probs: Tokens,
    old_log_probs: Tokens | None,
    mask: Mask,
    segment_ids: SegmentIds | None = None,
) -> Tokens:
    """log s_i = 1/|o_i| sum_t log(pi / pi_old): a sequence's ratio, to the power of 1 / length, at
    each of its tokens (GSPO, arXiv 2507.18071, equation 7)."""
    return sequence_mean(log_ratio(log_probs, old_log_probs), mask, segment_ids)


def sequence_token_log_ratio(
    log_probs: Tokens,
    old_log_probs: Tokens | None,
    mask: Mask,
    segment_ids: SegmentIds | None = None,
) -> Tokens:
    """log(sg[s_i] pi / sg[pi]): the sequence's ratio, with the gradient of the token (GSPO-token,
    arXiv 2507.18071, equation 14), so that advantages may differ between tokens."""
    sequence = sequence_log_ratio(log_probs, old_log_probs, mask, segment_ids)
    return jax.lax.stop_gradient(sequence) + (log_probs - jax.lax.stop_gradient(log_probs))
