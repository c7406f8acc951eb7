"""One GRPO update for any model and any optax optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from r1jax.objectives.advantages import Advantages, group_advantages
from r1jax.objectives.normalisation import token_weights
from r1jax.objectives.policy_loss import token_terms
from r1jax.settings.objective import GRPOConfig
from r1jax.train_step import (
    AfterUpdate,
    Metrics,
    TrainState,
    accumulate_gradients,
    apply_if_finite,
    init_train_state,
)

__all__ = [
    "Advantages",
    "GRPOBatch",
    "GRPOConfig",
    "TrainState",
    "group_advantages",
    "init_train_state",
    "make_grpo_step",
]


@struct.dataclass
class GRPOBatch:
    """What one update reads. N rows of T tokens; every leaf's first dimension is N.

    inputs: whatever `log_prob_fn` needs (tokens, positions, images, ...), any pytree.
    mask: [N, T], 1 where `log_prob_fn`'s value at (n, t) is a trained token: sampled tokens with
        their EOS, not the prompt, not padding; a row of zeros leaves a sample out.
    advantages: [N], or [N, T] for packed rows.
    old_log_probs: [N, T], or None when the batch was sampled by the present weights.
    reference_log_probs: [N, T], or None when kl_coefficient is 0.
    sampler_log_probs: [N, T], or None for no importance correction.
    """

    inputs: Any
    mask: Any
    advantages: Any
    old_log_probs: Any = None
    reference_log_probs: Any = None
    sampler_log_probs: Any = None


DEFAULT = GRPOConfig()


class Scored(NamedTuple):
    """What a `log_prob_fn` may tell beside the log-probs [N, T].

    entropy: [N, T], shown as a metric.
    penalty: [N], of each row; the mean over the rows of a batch is added to the loss.
    counts: any pytree of arrays, which are summed over the rows of a batch, for `after_update`.
    """

    log_probs: Any
    entropy: Any = None
    penalty: Any = None
    counts: Any = None


# (params, batch) -> log-probs [N, T], or a pair of log-probs and entropies, or `Scored`.
LogProbFn = Callable[[Any, GRPOBatch], Any]

Step = Callable[[TrainState, GRPOBatch], tuple[TrainState, Metrics]]


def make_grpo_step(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    config: GRPOConfig = DEFAULT,
    *,
    micro_batches: int = 1,
    after_update: AfterUpdate | None = None,
) -> Step:
    """Build `step(state, batch) -> (state, metrics)`, to be jitted, with the state donated:

        step = jax.jit(make_grpo_step(log_prob_fn, optax.adam(1e-6)), donate_argnums=0)

    The gradients with several micro-batches equal those with one: each token's weight is fixed
    from the whole batch's mask before it is split.

    Args:
      log_prob_fn: (params, batch) -> log-probs [N, T] aligned with batch.mask, or a pair
        (log-probs, entropies), or `Scored`. Differentiated with respect to params.
      optimizer: any optax transformation (put gradient clipping and schedules in it).
      config: the objective.
      micro_batches: parts that the rows are split into, to bound activation memory.
      after_update: what else is done to the weights, given what `Scored.counts` sums up to over the
        batch (a mixture of experts is balanced so).

    Returns:
      A pure function. Metrics are float32 scalars, means over trained tokens: loss, policy/kl,
      policy/entropy (when given), policy/clip_fraction, policy/ratio_mean, sampler/gap_mean,
      sampler/gap_max, optimizer/grad_norm, optimizer/finite. On policy the loss is near 0 by
      construction (advantages of a group sum to 0); read the reward and the gradient norm.
    """

    def loss_fn(params: Any, part: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        batch, weights, each_row = part
        found = log_prob_fn(params, batch)
        scored = Scored(*found) if isinstance(found, tuple) else Scored(found)
        log_probs, entropy = scored.log_probs, scored.entropy
        # A token outside the mask may hold anything, NaN included: it must not reach the sum.
        trained = batch.mask > 0
        log_probs = jnp.where(trained, log_probs, 0.0)

        def masked(values: Any) -> Any:
            return None if values is None else jnp.where(trained, values, 0.0)

        terms = token_terms(
            log_probs,
            batch.advantages,
            config=config,
            old_log_probs=masked(batch.old_log_probs),
            reference_log_probs=masked(batch.reference_log_probs),
            sampler_log_probs=masked(batch.sampler_log_probs),
        )
        mask = trained.astype(jnp.float32)
        sums = {
            "policy/kl": terms.kl,
            "policy/clip_fraction": terms.clipped,
            "policy/ratio_mean": terms.ratio,
        }
        if entropy is not None:
            sums["policy/entropy"] = entropy
        if batch.sampler_log_probs is not None:
            old = batch.old_log_probs
            mine = jax.lax.stop_gradient(log_probs) if old is None else masked(old)
            gap = jnp.abs(mine - masked(batch.sampler_log_probs))
            sums["sampler/gap_mean"] = gap
        aux = {name: jnp.sum(jnp.where(trained, value, 0.0)) for name, value in sums.items()}
        aux["tokens"] = mask.sum()
        if batch.sampler_log_probs is not None:
            aux["sampler/gap_max"] = jnp.max(jnp.where(trained, gap, 0.0))
        loss = jnp.sum(terms.loss * weights)
        if scored.penalty is not None:
            aux["penalty"] = jnp.sum(scored.penalty * each_row)
            loss = loss + aux["penalty"]
        return loss, (aux, scored.counts)

    def step(state: TrainState, batch: GRPOBatch) -> tuple[TrainState, Metrics]:
        weights = token_weights(
            batch.mask, config.normalisation, constant_length=config.constant_length
        )
        rows = len(batch.mask)
        each_row = jnp.full((rows,), 1 / rows, jnp.float32)
        loss, gradients, (aux, counts) = accumulate_gradients(
            loss_fn, state.params, (batch, weights, each_row), micro_batches
        )
        tokens = jnp.maximum(aux.pop("tokens").sum(), 1.0)
        gap_max, penalty = aux.pop("sampler/gap_max", None), aux.pop("penalty", None)
        counts = jax.tree.map(lambda parts: parts.sum(axis=0), counts)
        state, metrics = apply_if_finite(
            state, loss, gradients, optimizer, counts=counts, after_update=after_update
        )
        if penalty is not None:
            metrics["penalty"] = penalty.sum()
        metrics |= {name: value.sum() / tokens for name, value in aux.items()}
        if gap_max is not None:
            metrics["sampler/gap_max"] = gap_max.max()
        return state, metrics

    return step
