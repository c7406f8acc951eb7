"""One policy-gradient update for any objective, any model and any optax optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from r1jax.objectives.advantages import penalise_advantages, whiten_advantages
from r1jax.objectives.kl import divergence
from r1jax.objectives.normalisation import mean_weights, token_weights
from r1jax.objectives.objective import Objective, PolicyTokens, TokenTerms, token_terms
from r1jax.objectives.sequences import sequence_sum
from r1jax.objectives.shapes import (
    PER_ROW,
    PER_TOKEN,
    check_advantages,
    check_alike,
    check_floating,
    per_token,
)
from r1jax.train_step import AfterUpdate, LossOutput, Metrics, TrainState, TrainStep, train_step

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num, PyTree


@struct.dataclass
class GRPOBatch:
    """What one update reads: N rows of T tokens. The first dimension of all but scalars is N.

    inputs: whatever `log_prob_fn` needs (tokens, positions, images, ...), any pytree.
    mask: [N, T], above 0 where `log_prob_fn`'s value at (n, t) is a trained token: sampled tokens
        with their EOS, not the prompt, not padding; a row of zeros leaves a sample out.
    advantages: [N], or [N, T] for packed rows.
    old_log_probs: [N, T], or None when the batch was sampled by the present weights.
    reference_log_probs: [N, T], or None when kl_coefficient is 0.
    sampler_log_probs: [N, T], or None for no importance correction.
    lengths: [N, T], for packed rows: how many trained tokens the sequence of a token has. None: a
        row is one sequence.
    sequences: scalar, for packed rows: how many sequences of the batch have a trained token.
    samples: scalar, for packed rows: how many sequences the batch holds, trained or not; a penalty
        is a mean over them.
    used_micro_batches: scalar: only the first micro-batches, this many and 1 at least, hold
        anything; the others cost nothing. Row n is in micro-batch n % micro_batches. None: all do.
    segment_ids: [N, T], for packed rows and an objective that reads whole sequences: equal for the
        tokens of one, which are neighbours. None: a row is one sequence.
    kl_coefficients: [N, T], the penalty's coefficient of each token. None: the objective's.
    teacher_log_probs: [N, T], for `log_prob_fn`, which may show them beside the policy's.
    """

    inputs: PyTree
    mask: Num[Array, "batch time"] | Bool[Array, "batch time"]
    advantages: Float[Array, " batch"] | Float[Array, "batch time"]
    old_log_probs: Float[Array, "batch time"] | None = None
    reference_log_probs: Float[Array, "batch time"] | None = None
    sampler_log_probs: Float[Array, "batch time"] | None = None
    lengths: Num[Array, "batch time"] | None = None
    sequences: Num[Array, ""] | None = None
    samples: Int[Array, ""] | None = None
    used_micro_batches: Int[Array, ""] | None = None
    segment_ids: Int[Array, "batch time"] | None = None
    kl_coefficients: Float[Array, "batch time"] | None = None
    teacher_log_probs: Float[Array, "batch time"] | None = None


class PolicyOutputs(NamedTuple):
    """What a `log_prob_fn` returns of a micro-batch.

    entropy: shown as a metric; with its gradient, for an objective with an entropy bonus.
    penalty: of each row, summed over its sequences; the mean over the sequences of the batch is
        added to the loss.
    counts: any pytree of arrays, which are summed over the batch for `after_update`.
    token_loss: of each token, added to the objective's before both are weighed, such as the
        divergence to a teacher.
    token_metrics: by name, shown as means over trained tokens.
    """

    log_probs: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"] | None = None
    penalty: Float[Array, " batch"] | None = None
    counts: PyTree = None
    token_loss: Float[Array, "batch time"] | None = None
    token_metrics: Mapping[str, Float[Array, "batch time"]] = {}


class LogProbFn(Protocol):
    """The policy: log-probs of a batch's tokens, differentiated with respect to params."""

    def __call__(
        self, params: PyTree, batch: GRPOBatch, /
    ) -> PolicyOutputs | Float[Array, "batch time"]:
        """Log-probs aligned with batch.mask, alone or as `PolicyOutputs`."""
        ...


class _Weights(NamedTuple):
    tokens: Float[Array, "batch time"]
    rows: Float[Array, " batch"]


def make_policy_step(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    micro_batches: int = 1,
    after_update: AfterUpdate | None = None,
) -> TrainStep[GRPOBatch]:
    """Build `step(state, batch) -> (state, metrics)`, to be jitted, with the state donated:

        step = jax.jit(make_policy_step(log_prob_fn, optax.adam(1e-6), gspo()), donate_argnums=0)

    So jitted it consumes the state that it is given: the arrays of `state`, weights included, are
    deleted, and the new state is what to use. Weights that are kept, such as those of the
    reference, are copied before they become a part of a state: `jax.tree.map(jnp.copy, params)`.

    The gradients with several micro-batches equal those with one: each token's weight is fixed
    from the whole batch's mask before it is split.

    Args:
      log_prob_fn: (params, micro-batch) -> log-probs aligned with its mask, alone or as
        `PolicyOutputs`. (The micro-batch has no `lengths`, and no scalars.)
      optimizer: any optax transformation (put gradient clipping and schedules in it).
      objective: what is optimised; one of `r1jax.objectives.objective`, or of yours.
      micro_batches: parts that the rows are split into, to bound activation memory.
      after_update: what else is done to the weights, given what `PolicyOutputs.counts` sums up to
        over the batch (a mixture of experts is balanced so).

    Returns:
      A pure function, which raises ValueError as it is traced for arrays that do not fit together.
      Metrics are float32 scalars, means over trained tokens: loss, policy/kl, policy/entropy (when
      given), policy/clip_fraction, policy/ratio_mean, sampler/gap_mean, sampler/gap_max,
      optimizer/grad_norm, optimizer/finite; of an objective that reads whole sequences,
      policy/sequence_clip_fraction, the mean over sequences of the share that is clipped. On policy
      the loss of a clipped objective is near 0 (advantages of a group sum to 0); read the reward
      and the gradient norm.
    """
    by_sequence = "segment_ids" in objective.needs

    def loss_fn(params: PyTree, rows: tuple[GRPOBatch, _Weights]) -> LossOutput:
        batch, weights = rows
        outputs = _as_outputs(log_prob_fn(params, batch), batch)
        outputs, batch = _only_trained(outputs, batch)
        tokens = PolicyTokens(
            outputs.log_probs,
            batch.advantages,
            batch.mask,
            batch.old_log_probs,
            batch.reference_log_probs,
            batch.sampler_log_probs,
            outputs.entropy,
            batch.segment_ids,
            batch.kl_coefficients,
        )
        terms = token_terms(objective, tokens)
        losses = terms.loss if outputs.token_loss is None else terms.loss + outputs.token_loss
        loss = jnp.sum(losses * weights.tokens)
        output = _with_metrics(loss, terms, outputs, batch, by_sequence=by_sequence)
        if outputs.penalty is None:
            return output
        penalty = jnp.sum(outputs.penalty * weights.rows)
        return output._replace(loss=loss + penalty, sums={"penalty": penalty})

    def step(state: TrainState, batch: GRPOBatch) -> tuple[TrainState, Metrics]:
        _check_batch(batch, objective)
        tokens = token_weights(
            batch.mask,
            objective.normalisation,
            constant_length=objective.constant_length,
            lengths=batch.lengths,
            sequences=batch.sequences,
        )
        rows = len(batch.mask)
        samples = rows if batch.samples is None else batch.samples
        weights = _Weights(tokens, mean_weights(rows, samples))
        per_row = replace(
            batch, lengths=None, sequences=None, samples=None, used_micro_batches=None
        )
        return train_step(
            state,
            (per_row, weights),
            loss_fn,
            optimizer,
            micro_batches=micro_batches,
            used=batch.used_micro_batches,
            after_update=after_update,
        )

    return step


def batch_advantages(objective: Objective, batches: Sequence[GRPOBatch]) -> list[GRPOBatch]:
    """The mini-batches of a phase, with what their tokens decide done to their advantages: KL in
    the reward, then whitening over all of them. Most objectives have neither.

    Args:
      batches: on all devices, with old and reference log-probs if KL is in the reward.

    Raises:
      ValueError: something that the objective needs is missing.
    """
    penalty = objective.penalty
    in_reward = penalty is not None and penalty.in_reward
    if not objective.changes_token_advantages:
        return list(batches)
    results = []
    for batch in batches:
        _check_batch(batch, objective)
        trained = batch.mask > 0
        values = jnp.where(trained, per_token(batch.advantages, "mask", batch.mask), 0.0)
        if penalty is not None and in_reward:
            assert batch.old_log_probs is not None and batch.reference_log_probs is not None
            kl = divergence(batch.old_log_probs, batch.reference_log_probs, penalty.estimator)
            coefficient = penalty.coefficient
            if batch.kl_coefficients is not None:
                kl, coefficient = batch.kl_coefficients * kl, 1.0
            values = penalise_advantages(values, kl, coefficient, batch.mask, batch.segment_ids)
        results.append(values)
    if objective.whitened:
        results = whiten_advantages(results, [batch.mask for batch in batches])
    return [replace(b, advantages=a) for b, a in zip(batches, results, strict=True)]


_REMEDIES = {
    "old_log_probs": "those of the policy that sampled, as the trainer computes them",
    "reference_log_probs": "pass them, or set kl_coefficient to 0",
    "sampler_log_probs": "those of the distribution that was sampled from, or no importance_cap",
    "segment_ids": "rows hold several sequences, as lengths says, and are not told apart",
}


def _check_batch(batch: GRPOBatch, objective: Objective) -> None:
    for name in objective.needs:
        packed = name != "segment_ids" or batch.lengths is not None
        if name != "entropy" and packed and getattr(batch, name, None) is None:
            raise ValueError(
                f"objective {objective.name} needs {name} in the batch: "
                f"{_REMEDIES.get(name, 'it has none')}"
            )
    log_probs = {
        "old_log_probs": batch.old_log_probs,
        "reference_log_probs": batch.reference_log_probs,
        "sampler_log_probs": batch.sampler_log_probs,
    }
    others = {
        "segment_ids": batch.segment_ids,
        "lengths": batch.lengths,
        "kl_coefficients": batch.kl_coefficients,
    }
    check_alike(PER_TOKEN, {"mask": batch.mask, **log_probs, **others})
    check_floating(log_probs)
    check_advantages(batch.advantages, "mask", batch.mask)


def _as_outputs(
    returned: PolicyOutputs | Float[Array, "batch time"], batch: GRPOBatch
) -> PolicyOutputs:
    """Raises ValueError unless they fit the mask of the micro-batch."""
    outputs = returned if isinstance(returned, PolicyOutputs) else PolicyOutputs(returned)
    if not hasattr(outputs.log_probs, "shape"):
        raise ValueError(
            f"log_prob_fn returned a {type(outputs.log_probs).__name__}; return the log-probs "
            "[batch, time], or PolicyOutputs(log_probs, entropy)"
        )
    name = "{} returned by log_prob_fn".format
    per_token = {
        name("log_probs"): outputs.log_probs,
        name("entropy"): outputs.entropy,
        name("token_loss"): outputs.token_loss,
        **{name(key): value for key, value in outputs.token_metrics.items()},
    }
    check_alike(PER_TOKEN, {"mask": batch.mask, **per_token})
    check_floating(per_token)
    check_alike(PER_ROW, {"mask[:, 0]": batch.mask[:, 0], name("penalty"): outputs.penalty})
    return outputs


def _only_trained(outputs: PolicyOutputs, batch: GRPOBatch) -> tuple[PolicyOutputs, GRPOBatch]:
    """A token outside the mask may hold anything, NaN included: it must not reach the sums."""
    trained = batch.mask > 0

    def masked(values: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.where(trained, leaf, 0.0), values)

    packed = jnp.ndim(batch.advantages) == 2
    return outputs._replace(
        log_probs=masked(outputs.log_probs),
        entropy=masked(outputs.entropy),
        token_loss=masked(outputs.token_loss),
    ), replace(
        batch,
        advantages=masked(batch.advantages) if packed else batch.advantages,
        old_log_probs=masked(batch.old_log_probs),
        reference_log_probs=masked(batch.reference_log_probs),
        sampler_log_probs=masked(batch.sampler_log_probs),
    )


def _with_metrics(
    loss: Float[Array, ""],
    terms: TokenTerms,
    outputs: PolicyOutputs,
    batch: GRPOBatch,
    *,
    by_sequence: bool,
) -> LossOutput:
    """Metrics are means over the trained tokens; with `by_sequence` one over sequences, too."""
    trained = batch.mask > 0
    values = {
        "policy/kl": terms.kl,
        "policy/clip_fraction": terms.clipped,
        "policy/ratio_mean": terms.ratio,
    }
    values |= outputs.token_metrics
    if outputs.entropy is not None:
        values["policy/entropy"] = outputs.entropy
    maxima = {}
    if batch.sampler_log_probs is not None:
        old = batch.old_log_probs
        old = jax.lax.stop_gradient(outputs.log_probs) if old is None else old
        values["sampler/gap_mean"] = jnp.abs(old - batch.sampler_log_probs)
        maxima["sampler/gap_max"] = jnp.max(jnp.where(trained, values["sampler/gap_mean"], 0.0))
    tokens = trained.astype(jnp.float32).sum()
    means = {n: (jnp.sum(jnp.where(trained, x, 0.0)), tokens) for n, x in values.items()}
    if by_sequence:
        lengths = sequence_sum(trained.astype(jnp.float32), trained, batch.segment_ids)
        share = jnp.where(trained, 1 / jnp.maximum(lengths, 1), 0.0)
        means["policy/sequence_clip_fraction"] = (jnp.sum(terms.clipped * share), jnp.sum(share))
    return LossOutput(loss, means=means, maxima=maxima, counts=outputs.counts)
