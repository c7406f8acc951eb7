"""Surrogates: of a ratio and an advantage, what is maximised at each token.

Each is usable alone; `r1jax.objectives.objective` puts them together. All raise ValueError, as they
are traced, for arrays of other shapes: an advantage is one for each row, [batch], or one for each
token, [batch, time]; everything else is [batch, time].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.objectives.sequences import sequence_mean
from r1jax.objectives.shapes import PER_TOKEN, check_alike, per_token

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from r1jax.objectives.sequences import Mask, SegmentIds

    Tokens = Float[Array, "batch time"]
    Advantages = Float[Array, " batch"] | Float[Array, "batch time"]


class Surrogate(NamedTuple):
    """objective: what is maximised. clipped: where a bound on the ratio is in force; the gradient
    is 0 there, but for CISPO, whose bound is on a weight."""

    objective: Tokens
    clipped: Bool[Array, "batch time"]


def clipped_surrogate(
    ratio: Tokens, advantages: Advantages, *, clip_low: float, clip_high: float
) -> Surrogate:
    """min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347, equation 7).

    Two bounds as in DAPO (arXiv 2503.14476, equation 10). With the ratio of a sequence it is GSPO's
    (arXiv 2507.18071, equation 5).
    """
    advantages = per_token(advantages, "ratio", ratio)
    clipped_ratio = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    objective = jnp.minimum(ratio * advantages, clipped_ratio * advantages)
    return Surrogate(objective, ratio * advantages > clipped_ratio * advantages)


def dual_clip(surrogate: Surrogate, advantages: Advantages, factor: float) -> Surrogate:
    """max(surrogate, factor A) where A < 0: a bound on the loss of a sample whose ratio exploded
    (arXiv 1912.09729, equation 5).

    Args:
      factor: above 1.
    """
    advantages = per_token(advantages, "ratio", surrogate.objective)
    floor = factor * advantages
    below = (advantages < 0) & (surrogate.objective < floor)
    return Surrogate(jnp.where(below, floor, surrogate.objective), surrogate.clipped | below)


def reinforce_surrogate(ratio: Tokens, log_probs: Tokens, advantages: Advantages) -> Surrogate:
    """sg[r] A log pi: REINFORCE, whose r is 1 on policy (RLOO, arXiv 2402.14740, section 3.2); off
    policy each token is weighted by its ratio, without bound."""
    check_alike(PER_TOKEN, {"ratio": ratio, "log_probs": log_probs})
    advantages = per_token(advantages, "ratio", ratio)
    objective = jax.lax.stop_gradient(ratio) * advantages * log_probs
    return Surrogate(objective, jnp.zeros(ratio.shape, bool))


def cispo_surrogate(
    ratio: Tokens,
    log_probs: Tokens,
    advantages: Advantages,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """sg[clip(r, 1 - low, 1 + high)] A log pi: the weight is bounded, and no token loses its
    gradient (CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5).

    Args:
      clip_low: 1 and above is no lower bound, as published.
    """
    check_alike(PER_TOKEN, {"ratio": ratio, "log_probs": log_probs})
    weight = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    clipped = weight != ratio
    return reinforce_surrogate(weight, log_probs, advantages)._replace(clipped=clipped)


def sapo_surrogate(
    ratio: Tokens,
    advantages: Advantages,
    *,
    temperature_positive: float,
    temperature_negative: float,
) -> Surrogate:
    """4 / tau sigmoid(tau (r - 1)) A, with one tau where A > 0 and one elsewhere (SAPO, arXiv
    2511.20347, equations 5 and 6).

    Nothing is clipped: the gradient is 4 p (1 - p) r A grad log pi, with p the sigmoid, which fades
    away from r = 1, the faster, the higher tau.
    """
    advantages = per_token(advantages, "ratio", ratio)
    tau = jnp.where(advantages > 0, temperature_positive, temperature_negative)
    objective = 4 / tau * jax.nn.sigmoid(tau * (ratio - 1)) * advantages
    return Surrogate(objective, jnp.zeros(ratio.shape, bool))


def geometric_mean_surrogate(
    log_ratio: Tokens,
    advantages: Advantages,
    mask: Mask,
    segment_ids: SegmentIds | None = None,
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """A (prod_t rho_t)^(1 / |o|), where rho is r, bounded in [e^-low, e^high] on the side to which
    A pushes it: the geometric mean over a sequence, at each of its tokens (GMPO, arXiv 2507.20673,
    equation 4).

    It is computed from logs. With the normalisation `sequence_mean` each sequence counts once.

    Args:
      log_ratio: log(pi / pi_old) of each token. advantages: of a sequence; their mean, if they
        differ between its tokens.
      mask, segment_ids: as of `sequence_sum`.
      clip_low, clip_high: of log r.
    """
    advantages = per_token(advantages, "log_ratio", log_ratio)
    advantages = jnp.broadcast_to(advantages, log_ratio.shape)
    side = jnp.sign(advantages)
    bounded = side * jnp.minimum(side * log_ratio, side * jnp.clip(log_ratio, -clip_low, clip_high))
    clipped = bounded != side * side * log_ratio
    mean = sequence_mean(advantages, mask, segment_ids)
    return Surrogate(mean * jnp.exp(sequence_mean(bounded, mask, segment_ids)), clipped)
