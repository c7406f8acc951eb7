"""One GRPO update for any model and any optax optimizer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from r1jax.objectives.normalisation import mean_weights, token_weights
from r1jax.objectives.policy_loss import TokenTerms, token_terms
from r1jax.objectives.shapes import (
    PER_ROW,
    PER_TOKEN,
    check_advantages,
    check_alike,
    check_floating,
)
from r1jax.settings.objective import GRPOConfig
from r1jax.train_step import (
    AfterUpdate,
    LossOutput,
    Metrics,
    TrainState,
    TrainStep,
    init_train_state,
    train_step,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Num, PyTree


__all__ = [
    "Advantages",
    "GRPOBatch",
    "GRPOConfig",
    "PolicyOutputs",
    "TrainState",
    "group_advantages",
    "init_train_state",
    "make_grpo_step",
]


class Advantages(NamedTuple):
    """zero_variance: the groups that teach nothing, as all their scored samples earned the same."""

    values: Float[Array, "prompts samples"]
    zero_variance: Bool[Array, " prompts"]


def group_advantages(
    rewards: Float[Array, "prompts samples"],
    *,
    scale: Literal["std", "none"] = "std",
    epsilon: float = 1e-6,
) -> Advantages:
    """A_i = (R_i - mean R) / std R over the samples of one prompt, in float32.

    A reward that is NaN (its verifier failed) takes no part: it is left out of the group's mean
    and std, and its advantage is 0. The std is the population's, as in the paper. Where all scored
    samples of a group earned the same, however many they are, the advantages are exactly 0.

    Args:
      rewards: the samples of one prompt are one row, so groups cannot mix.
      scale: `std` as published, `none` to only centre (Dr. GRPO, arXiv 2503.20783).
      epsilon: added to the std, so that nearly equal rewards do not explode.

    Raises:
      ValueError: rewards are not [prompts, samples].
    """
    if jnp.ndim(rewards) != 2:
        raise ValueError(
            f"rewards has shape {jnp.shape(rewards)}; expected [prompts, samples]: put the samples "
            "of a prompt in one row with rewards.reshape(-1, samples)"
        )
    scored = jnp.isfinite(rewards)
    kept = jnp.where(scored, rewards.astype(jnp.float32), 0.0)
    count = jnp.maximum(scored.sum(axis=1, keepdims=True), 1)
    mean = kept.sum(axis=1, keepdims=True) / count
    centred = jnp.where(scored, kept - mean, 0.0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / count)
    values = centred / (std + epsilon) if scale == "std" else centred
    # Of equal rewards the mean is rounded, and so the std is not always 0.
    highest = jnp.max(jnp.where(scored, kept, -jnp.inf), axis=1)
    lowest = jnp.min(jnp.where(scored, kept, jnp.inf), axis=1)
    equal = highest <= lowest
    return Advantages(jnp.where(equal[:, None], 0.0, values), equal)


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


class PolicyOutputs(NamedTuple):
    """What a `log_prob_fn` returns of a micro-batch.

    entropy: shown as a metric.
    penalty: of each row, summed over its sequences; the mean over the sequences of the batch is
        added to the loss.
    counts: any pytree of arrays, which are summed over the batch for `after_update`.
    """

    log_probs: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"] | None = None
    penalty: Float[Array, " batch"] | None = None
    counts: PyTree = None


class _LogProbFn(Protocol):
    """The policy: log-probs of a batch's tokens, differentiated with respect to params."""

    def __call__(
        self, params: PyTree, batch: GRPOBatch, /
    ) -> PolicyOutputs | Float[Array, "batch time"]:
        """Log-probs aligned with batch.mask, alone or as `PolicyOutputs`."""
        ...


class _Weights(NamedTuple):
    tokens: Float[Array, "batch time"]
    rows: Float[Array, " batch"]


_DEFAULT = GRPOConfig()


def make_grpo_step(
    log_prob_fn: _LogProbFn,
    optimizer: optax.GradientTransformation,
    config: GRPOConfig = _DEFAULT,
    *,
    micro_batches: int = 1,
    after_update: AfterUpdate | None = None,
) -> TrainStep[GRPOBatch]:
    """Build `step(state, batch) -> (state, metrics)`, to be jitted, with the state donated:

        step = jax.jit(make_grpo_step(log_prob_fn, optax.adam(1e-6)), donate_argnums=0)

    The gradients with several micro-batches equal those with one: each token's weight is fixed
    from the whole batch's mask before it is split.

    Args:
      log_prob_fn: (params, micro-batch) -> log-probs aligned with its mask, alone or as
        `PolicyOutputs`. (The micro-batch has no `lengths`, and no scalars.)
      optimizer: any optax transformation (put gradient clipping and schedules in it).
      config: the objective.
      micro_batches: parts that the rows are split into, to bound activation memory.
      after_update: what else is done to the weights, given what `PolicyOutputs.counts` sums up to
        over the batch (a mixture of experts is balanced so).

    Returns:
      A pure function, which raises ValueError as it is traced for arrays that do not fit together.
      Metrics are float32 scalars, means over trained tokens: loss, policy/kl, policy/entropy (when
      given), policy/clip_fraction, policy/ratio_mean, sampler/gap_mean, sampler/gap_max,
      optimizer/grad_norm, optimizer/finite. On policy the loss is near 0 by construction
      (advantages of a group sum to 0); read the reward and the gradient norm.
    """

    def loss_fn(params: PyTree, rows: tuple[GRPOBatch, _Weights]) -> LossOutput:
        batch, weights = rows
        outputs = _as_outputs(log_prob_fn(params, batch), batch)
        outputs, batch = _only_trained(outputs, batch)
        terms = token_terms(
            outputs.log_probs,
            batch.advantages,
            config=config,
            old_log_probs=batch.old_log_probs,
            reference_log_probs=batch.reference_log_probs,
            sampler_log_probs=batch.sampler_log_probs,
        )
        loss = jnp.sum(terms.loss * weights.tokens)
        output = _with_metrics(loss, terms, outputs, batch)
        if outputs.penalty is None:
            return output
        penalty = jnp.sum(outputs.penalty * weights.rows)
        return output._replace(loss=loss + penalty, sums={"penalty": penalty})

    def step(state: TrainState, batch: GRPOBatch) -> tuple[TrainState, Metrics]:
        _check_batch(batch)
        tokens = token_weights(
            batch.mask,
            config.normalisation,
            constant_length=config.constant_length,
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


def _check_batch(batch: GRPOBatch) -> None:
    log_probs = {
        "old_log_probs": batch.old_log_probs,
        "reference_log_probs": batch.reference_log_probs,
        "sampler_log_probs": batch.sampler_log_probs,
    }
    check_alike(PER_TOKEN, {"mask": batch.mask, **log_probs, "lengths": batch.lengths})
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
    per_token = {name("log_probs"): outputs.log_probs, name("entropy"): outputs.entropy}
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
        log_probs=masked(outputs.log_probs), entropy=masked(outputs.entropy)
    ), replace(
        batch,
        advantages=masked(batch.advantages) if packed else batch.advantages,
        old_log_probs=masked(batch.old_log_probs),
        reference_log_probs=masked(batch.reference_log_probs),
        sampler_log_probs=masked(batch.sampler_log_probs),
    )


def _with_metrics(
    loss: Float[Array, ""], terms: TokenTerms, outputs: PolicyOutputs, batch: GRPOBatch
) -> LossOutput:
    """Metrics are means over the trained tokens."""
    trained = batch.mask > 0
    values = {
        "policy/kl": terms.kl,
        "policy/clip_fraction": terms.clipped,
        "policy/ratio_mean": terms.ratio,
    }
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
    return LossOutput(loss, means=means, maxima=maxima, counts=outputs.counts)
