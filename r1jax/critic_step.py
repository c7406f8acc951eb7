"""One update of a critic, and the advantages of its values, for any model and optax optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from r1jax.objectives.advantages import generalised_advantages, whiten_advantages
from r1jax.objectives.kl import divergence
from r1jax.objectives.normalisation import token_weights
from r1jax.objectives.objective import Objective
from r1jax.objectives.shapes import PER_TOKEN, check_alike, per_token
from r1jax.objectives.value_loss import explained_variance, value_loss
from r1jax.policy_step import GRPOBatch
from r1jax.train_step import LossOutput, Metrics, TrainState, TrainStep, train_step

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num, PyTree


class CriticBatch(NamedTuple):
    """What an update of a critic reads: N rows of T tokens.

    inputs: whatever `value_fn` needs, leaves [N, ...]. mask: above 0 where a token is trained.
    values: of the critic before the updates of the phase. returns: what it is to give there.
    used_micro_batches: as of `GRPOBatch`.
    """

    inputs: PyTree
    mask: Num[Array, "batch time"] | Bool[Array, "batch time"]
    values: Float[Array, "batch time"]
    returns: Float[Array, "batch time"]
    used_micro_batches: Int[Array, ""] | None = None


class ValueFn(Protocol):
    """The critic: a value before each token, differentiated with respect to params."""

    def __call__(self, params: PyTree, inputs: PyTree, /) -> Float[Array, "batch time"]:
        """Values aligned with the mask of the batch."""
        ...


def critic_advantages(
    objective: Objective,
    batches: Sequence[GRPOBatch],
    values: Sequence[Float[Array, "batch time"]],
) -> tuple[list[GRPOBatch], list[CriticBatch]]:
    """The mini-batches of a phase with advantages of a critic's values, and what it learns of them.

    r_t is the reward of a token, less coefficient * KL_t where that penalty is in the reward; A is
    `generalised_advantages`, and the return A + V, before A is whitened over the phase.

    Args:
      batches: with rewards of tokens in place of advantages: an outcome's at the last token of its
        sample, a step's at the step's last one; and with old and reference log-probs if KL is in
        the reward. Several sequences of a row have other `segment_ids`.
      values: of each batch, before each token.

    Raises:
      ValueError: arrays of other shapes, or the objective has no critic.
    """
    terms, penalty = objective.critic, objective.penalty
    if terms is None:
        raise ValueError(f"objective {objective.name} has no critic")
    advantages, learnt = [], []
    for batch, value in zip(batches, values, strict=True):
        rewards = per_token(batch.advantages, "mask", batch.mask)
        if penalty is not None and penalty.in_reward:
            if batch.old_log_probs is None or batch.reference_log_probs is None:
                raise ValueError("KL in the reward needs old_log_probs and reference_log_probs")
            kl = divergence(batch.old_log_probs, batch.reference_log_probs, penalty.estimator)
            rewards = rewards - penalty.coefficient * kl
        trained = batch.mask > 0
        value = jnp.where(trained, value, 0)
        advantage = generalised_advantages(
            rewards,
            value,
            batch.mask,
            batch.segment_ids,
            discount=terms.discount,
            decay=terms.decay,
        )
        advantages.append(advantage)
        returns = advantage + value
        used = batch.used_micro_batches
        learnt.append(CriticBatch(batch.inputs, batch.mask, value, returns, used))
    if terms.whitened:
        advantages = whiten_advantages(advantages, [batch.mask for batch in batches])
    return [replace(b, advantages=a) for b, a in zip(batches, advantages, strict=True)], learnt


def make_critic_step(
    value_fn: ValueFn,
    optimizer: optax.GradientTransformation,
    *,
    clip: float | None = None,
    micro_batches: int = 1,
) -> TrainStep[CriticBatch]:
    """Build `step(state, batch) -> (state, metrics)`, to be jitted, with the state donated.

    The loss is the mean of `value_loss` over trained tokens.

    Returns:
      A pure function, which raises ValueError as it is traced for arrays that do not fit together.
      Metrics are float32 scalars: critic/loss, critic/clip_fraction, critic/grad_norm,
      critic/finite; and of the values before the updates of the phase critic/value_mean,
      critic/return_mean, critic/explained_variance.
    """

    def loss_fn(params: PyTree, rows: tuple[CriticBatch, Float[Array, "batch time"]]) -> LossOutput:
        batch, weights = rows
        trained = batch.mask > 0
        values = value_fn(params, batch.inputs)
        check_alike(PER_TOKEN, {"mask": batch.mask, "values returned by value_fn": values})
        # Elsewhere a value may be anything, NaN included.
        values = jnp.where(trained, values, 0)
        loss = value_loss(values, batch.returns, batch.values, clip=clip)
        clipped = jnp.sum(trained & loss.clipped), jnp.sum(trained)
        total = jnp.sum(jnp.where(trained, loss.loss, 0) * weights)
        return LossOutput(total, means={"critic/clip_fraction": clipped})

    def step(state: TrainState, batch: CriticBatch) -> tuple[TrainState, Metrics]:
        arrays = {"mask": batch.mask, "values": batch.values, "returns": batch.returns}
        check_alike(PER_TOKEN, arrays)
        weights = token_weights(batch.mask, "token_mean")
        state, metrics = train_step(
            state,
            (batch._replace(used_micro_batches=None), weights),
            loss_fn,
            optimizer,
            micro_batches=micro_batches,
            used=batch.used_micro_batches,
        )
        return state, {
            "critic/loss": metrics["loss"],
            "critic/explained_variance": explained_variance(
                batch.values, batch.returns, batch.mask
            ),
            "critic/value_mean": _mean(batch.values, weights),
            "critic/return_mean": _mean(batch.returns, weights),
            "critic/clip_fraction": metrics["critic/clip_fraction"],
            "critic/grad_norm": metrics["optimizer/grad_norm"],
            "critic/finite": metrics["optimizer/finite"],
        }

    return step


def _mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(weights > 0, values, 0) * weights)
