"""Advantages: how much better a sample, or a token, did than was to be expected.

The first functions read rewards [prompts, samples], the samples of one prompt in one row, so that
groups cannot mix. A reward that is NaN (its verifier failed) takes no part: it is left out of every
mean and std, and its advantage is 0. The others read advantages of tokens [batch, time].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.objectives.sequences import sum_to_end
from r1jax.objectives.shapes import PER_TOKEN, check_alike, per_token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Bool, Float

    from r1jax.objectives.sequences import Mask, SegmentIds

    Rewards = Float[Array, "prompts samples"]
    Tokens = Float[Array, "batch time"]


class Advantages(NamedTuple):
    """zero_variance: the groups that teach nothing, as all their scored samples earned the same."""

    values: Float[Array, "prompts samples"]
    zero_variance: Bool[Array, " prompts"]


def group_advantages(
    rewards: Rewards, *, scale: Literal["std", "none"] = "std", epsilon: float = 1e-6
) -> Advantages:
    """A_i = (R_i - mean R) / std R over the samples of one prompt, in float32.

    A reward that is NaN (its verifier failed) takes no part: it is left out of the group's mean
    and std, and its advantage is 0. The std is the population's, as in the paper (GRPO, arXiv
    2402.03300, section 4.1). Where all scored samples of a group earned the same, however many they
    are, the advantages are exactly 0.

    Args:
      scale: `std` as published, `none` to only centre (Dr. GRPO, arXiv 2503.20783).
      epsilon: added to the std, so that nearly equal rewards do not explode.

    Raises:
      ValueError: rewards are not [prompts, samples].
    """
    scored, kept, count = _scored(rewards)
    mean = kept.sum(axis=1, keepdims=True) / count
    centred = jnp.where(scored, kept - mean, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count)
    values = centred / (std + epsilon) if scale == "std" else centred
    # Of equal rewards the mean is rounded, and so the std is not always 0.
    equal = _equal(scored, kept)
    return Advantages(jnp.where(equal[:, None], 0.0, values), equal)


def leave_one_out_advantages(rewards: Rewards) -> Advantages:
    """A_i = R_i - mean of R_j, j != i, over the samples of one prompt (RLOO, arXiv 2402.14740,
    section 3.2): a baseline that does not depend on the sample, so that the gradient has no bias.

    A group with one scored sample has no baseline, and advantages of 0.

    Raises:
      ValueError: rewards are not [prompts, samples].
    """
    scored, kept, count = _scored(rewards)
    others = (kept.sum(axis=1, keepdims=True) - kept) / jnp.maximum(count - 1, 1)
    equal = _equal(scored, kept)
    values = jnp.where(scored & ~equal[:, None], kept - others, 0.0)
    return Advantages(values, equal)


def rewards_as_advantages(rewards: Rewards) -> Advantages:
    """A_i = R_i, for `whiten_advantages` over a phase (REINFORCE++, arXiv 2501.03262, equation 8).

    Raises:
      ValueError: rewards are not [prompts, samples].
    """
    scored, kept, _ = _scored(rewards)
    return Advantages(kept, _equal(scored, kept))


def whiten_advantages(
    advantages: Sequence[Tokens], masks: Sequence[Mask], *, epsilon: float = 1e-6
) -> list[Tokens]:
    """(A - mean A) / std A over the trained tokens of all batches together (REINFORCE++, arXiv
    2501.03262, equation 10); 0 elsewhere, and everywhere if all are equal.

    With several processes the arrays are global, and so are mean and std.

    Args:
      advantages, masks: of the mini-batches of a phase. epsilon: added to the std.

    Raises:
      ValueError: a mask does not have the shape of its advantages.
    """
    trained = []
    for values, mask in zip(advantages, masks, strict=True):
        check_alike(PER_TOKEN, {"advantages": values, "mask": mask})
        trained.append(mask > 0)
    pairs = list(zip(advantages, trained, strict=True))
    count = jnp.maximum(sum(jnp.sum(kept, dtype=jnp.int32) for kept in trained), 1)
    mean = sum(jnp.sum(jnp.where(kept, a, 0)) for a, kept in pairs) / count
    squares = [jnp.sum(jnp.where(kept, jnp.square(a - mean), 0)) for a, kept in pairs]
    std = jnp.sqrt(sum(squares) / count)
    highest = jnp.stack([jnp.max(jnp.where(kept, a, -jnp.inf)) for a, kept in pairs]).max()
    lowest = jnp.stack([jnp.min(jnp.where(kept, a, jnp.inf)) for a, kept in pairs]).min()
    differ = highest > lowest  # of equal ones the mean is rounded, and the std not always 0
    return [jnp.where(kept & differ, (a - mean) / (std + epsilon), 0) for a, kept in pairs]


def penalise_advantages(
    advantages: Float[Array, " batch"] | Tokens,
    kl: Tokens,
    coefficient: float,
    mask: Mask,
    segment_ids: SegmentIds | None = None,
) -> Tokens:
    """A_t - beta sum_{i >= t} KL_i over the rest of the sequence: KL in the reward (PPO for RLHF,
    arXiv 2203.02155; REINFORCE++, arXiv 2501.03262, equation 8).

    A token answers for its own penalty and those behind it. The penalty gets no baseline, which
    leaves the gradient without bias. It carries no gradient itself.

    Args:
      kl: an estimate of each token under the policy that sampled, such as `k1_divergence`.

    Raises:
      ValueError: arrays of other shapes.
    """
    advantages = per_token(advantages, "kl", kl)
    return advantages - coefficient * sum_to_end(jax.lax.stop_gradient(kl), mask, segment_ids)


def generalised_advantages(
    rewards: Tokens,
    values: Tokens,
    mask: Mask,
    segment_ids: SegmentIds | None = None,
    *,
    discount: float = 1.0,
    decay: float = 1.0,
) -> Tokens:
    """A_t = sum_{k >= 0} (gamma lambda)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}) over the trained
    tokens of the rest of a sequence, behind whose end V is 0 (GAE, arXiv 1506.02438, equation 16);
    0 where nothing is trained. No gradient.

    With lambda = 1 it is what is still to come of the reward, less V_t: as R1's paper compares PPO.
    Tokens that are not trained, such as those of an instruction between two turns, are passed over:
    what follows a token is the next trained one.

    Args:
      rewards: of each token; an outcome's stands at the last one.
      values: of a critic, before each token. segment_ids: as of `sequence_sum`.
      discount: gamma. decay: lambda.

    Raises:
      ValueError: arrays of other shapes.
    """
    arrays = {"rewards": rewards, "values": values, "mask": mask, "segment_ids": segment_ids}
    check_alike(PER_TOKEN, arrays)
    trained = mask > 0
    rewards, values = (jnp.where(trained, x, 0) for x in jax.lax.stop_gradient((rewards, values)))
    same = jnp.ones_like(trained[:, 1:])
    if segment_ids is not None:
        same = segment_ids[:, :-1] == segment_ids[:, 1:]
    goes_on = jnp.pad(same, ((0, 0), (0, 1)))  # to the token behind
    next_values = _from_the_end((goes_on & ~trained).astype(values.dtype), values)
    after = jnp.where(goes_on, jnp.roll(next_values, -1, axis=1), 0)
    errors = jnp.where(trained, rewards + discount * after - values, 0)
    factors = jnp.where(goes_on, jnp.where(trained, discount * decay, 1), 0).astype(errors.dtype)
    return jnp.where(trained, _from_the_end(factors, errors), 0)


def _from_the_end(factors: Tokens, terms: Tokens) -> Tokens:
    """x_t = terms_t + factors_t x_{t+1}."""

    def add(
        later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        (a, b), (c, d) = later, earlier
        return a * c, d + c * b

    return jax.lax.associative_scan(add, (factors, terms), reverse=True, axis=1)[1]


def _scored(rewards: Rewards) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rewards are scored, the rewards in float32 with 0 for the others, and their number."""
    if jnp.ndim(rewards) != 2:
        raise ValueError(
            f"rewards has shape {jnp.shape(rewards)}; expected [prompts, samples]: put the samples "
            "of a prompt in one row with rewards.reshape(-1, samples)"
        )
    scored = jnp.isfinite(rewards)
    kept = jnp.where(scored, rewards.astype(jnp.float32), 0.0)
    return scored, kept, jnp.maximum(scored.sum(axis=1, keepdims=True), 1)


def _equal(scored: jax.Array, kept: jax.Array) -> Bool[Array, " prompts"]:
    highest = jnp.max(jnp.where(scored, kept, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(scored, kept, jnp.inf), axis=1)
    return highest <= lowest
