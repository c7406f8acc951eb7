"""Supervised training on packed rows: pretraining on texts, fine-tuning on conversations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.data import PackedRows, packed_once
from r1jax.models import AheadScores, Decoder, ahead_scores, token_scores
from r1jax.models.log_probs import follows, routed_scores
from r1jax.models.parameters import Params
from r1jax.objectives.normalisation import mean_weights
from r1jax.processes import process_batch_slice
from r1jax.run.context import Context
from r1jax.run.expert_balance import check_experts, imbalance_of, loads_of, make_after_update
from r1jax.run.optimizer import make_optimizer, make_schedule
from r1jax.run.train_loop import TrainLoop
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.sft.settings import SFTStage
from r1jax.train_step import LossOutput, TrainStep, make_train_step

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# Batches of the held-out rows, from the start; None where the stage names none.
HeldOut = Callable[[], Iterator[dict[str, np.ndarray]]]


def run_pretrain(stage: PretrainStage, context: Context, directory: Path) -> None:
    """Train on the dataset's texts, resuming where a former process stopped."""
    model = context.model_of(stage.name)
    share = process_batch_slice(context.layout)
    items, encode = context.texts(stage.data, model)
    rows = PackedRows(
        items,
        encode,
        model.tokenizer,
        row_tokens=stage.row_tokens,
        seed=context.seed(stage.name),
        process_index=share.index,
        process_count=share.count,
    )
    _train(stage, context, directory, rows, stage.steps, None)


def run_sft(stage: SFTStage, context: Context, directory: Path) -> None:
    """Train on the assistant's part of conversations, resuming where a former process stopped."""
    model = context.model_of(stage.name)
    share = process_batch_slice(context.layout)
    items, encode = context.conversations(stage.data, model)
    rows = PackedRows(
        items,
        encode,
        model.tokenizer,
        row_tokens=stage.row_tokens,
        seed=context.seed(stage.name),
        process_index=share.index,
        process_count=share.count,
    )
    # Counting rows means encoding all of the data: only where the epochs ask for it.
    steps = stage.steps or stage.steps_for(rows.rows_per_epoch())
    held_out: HeldOut | None = None
    if stage.held_out is not None:
        others, encode_others = context.conversations(stage.held_out, model)
        held_out = partial(
            packed_once,
            others,
            encode_others,
            model.tokenizer,
            row_tokens=stage.row_tokens,
            rows_per_batch=stage.rows_per_step,
            process_index=share.index,
            process_count=share.count,
        )
    _train(stage, context, directory, rows, steps, held_out)


def _train(
    stage: PretrainStage | SFTStage,
    context: Context,
    directory: Path,
    rows: PackedRows[Any],
    steps: int,
    held_out: HeldOut | None,
) -> None:
    model = context.model_of(stage.name).decoder
    schedule = make_schedule(stage.optimizer, steps)
    optimizer = make_optimizer(stage.optimizer, steps)
    measure = jax.jit(partial(loss_sums, model=model))
    update = make_update(stage, model, optimizer)

    with TrainLoop(stage, context, directory, steps, optimizer, update) as loop:
        loop.restore(rows)
        seconds, tokens = 0.0, 0
        while loop.step < steps:
            loop.begin_round()
            batch = loop.place(rows.take(stage.rows_per_step))
            loop.clock.lap("data")
            metrics = loop.update(batch)
            seconds += loop.clock.lap("update")
            tokens += stage.rows_per_step * stage.row_tokens
            step = loop.step
            logged = step % stage.log_every == 0 or step == steps
            if held_out is not None and isinstance(stage, SFTStage):
                if step % stage.held_out_every == 0 or step == steps:
                    parts = (measure(loop.state.params, loop.place(b)) for b in held_out())
                    metrics["held_out/loss"] = mean_loss(parts)
                    loop.clock.lap("held_out")
                    logged = True
            if logged:
                metrics["optimizer/learning_rate"] = schedule(step - 1)
                loop.recorder.log(step, metrics)
                rate = tokens / seconds
                seconds, tokens = 0.0, 0
                loop.log_timings({"tokens_per_second/update": rate})
                loop.progress.update(step, loss=float(metrics["loss"]), tokens_per_second=rate)
            loop.save_if_due(rows)
        if rows.dropped:
            loop.progress.print(
                f"{stage.name}: {rows.dropped} documents were longer than row_tokens = "
                f"{stage.row_tokens} and left out"
            )
        loop.finish()


class _Weights(NamedTuple):
    """Of each row, all equal: of the next token's sum, of the module's, and of the imbalance's."""

    loss: Float[Array, " rows"]
    ahead: Float[Array, " rows"]
    imbalance: Float[Array, " rows"]


def make_update(
    stage: PretrainStage | SFTStage, model: Decoder, optimizer: optax.GradientTransformation
) -> TrainStep[Mapping[str, jax.Array]]:
    """One update on packed rows: `tokens`, `positions`, `segment_ids` and `trained`.

    Its `loss` is the next token's, whatever else is trained.

    Raises:
      ValueError: the stage asks for something about experts that the model has no use for.
    """
    check_experts(stage.name, stage.balance, model.config)
    with_module, balance = bool(stage.mtp_weight), stage.balance.sequence_loss > 0

    def weigh(
        batch: Mapping[str, jax.Array], step: Int[Array, ""]
    ) -> tuple[Mapping[str, jax.Array], _Weights]:
        rows = stage.rows_per_step
        return batch, _Weights(
            mean_weights(rows, batch["trained"].sum()),
            mean_weights(rows, jnp.sum(predicted_ahead(batch)), mtp_weight(stage, step)),
            mean_weights(rows, _sequences(batch), stage.balance.sequence_loss),
        )

    def loss_fn(params: Params, rows: tuple[Mapping[str, jax.Array], _Weights]) -> LossOutput:
        batch, weights = rows
        count = batch["trained"].sum()
        if with_module:
            ahead_of = ahead_scores(params, **_inputs(batch), model=model, balance=balance)
            total, ahead, agreed = ahead_sums(ahead_of, batch)
            ahead_count = jnp.sum(predicted_ahead(batch))
            means = {
                "loss": (total, count),
                "mtp/loss": (ahead, ahead_count),
                "mtp/acceptance": (agreed, ahead_count),
            }
            loss, routings = total * weights.loss[0] + ahead * weights.ahead[0], ahead_of.routings
        else:
            scores, routings = routed_scores(params, **_inputs(batch), model=model, balance=balance)
            total = _trained_sum(scores.log_probs, batch)
            means = {"loss": (total, count)} if balance else {}
            loss = total * weights.loss[0]
        loads = loads_of(routings)
        if balance:
            imbalance = imbalance_of(routings).sum()
            layers = sum(len(load) for load in loads.values())
            means["experts/imbalance"] = (imbalance, _sequences(batch) * layers)
            loss = loss + imbalance * weights.imbalance[0]
        return LossOutput(loss, {"tokens/trained": count.astype(jnp.float32)}, means, counts=loads)

    return make_train_step(
        weigh,
        loss_fn,
        optimizer,
        micro_batches=stage.micro_batches,
        after_update=make_after_update(stage.balance, model.config),
    )


def _sequences(batch: Mapping[str, jax.Array]) -> Int[Array, ""]:
    """How many sequences the packed rows hold."""
    return jnp.sum((batch["positions"] == 0) & (batch["segment_ids"] != 0))


def mtp_weight(stage: PretrainStage | SFTStage, step: jax.Array) -> jax.Array:
    """The weight that multi-token prediction has at a step, a float32 scalar."""
    if not isinstance(stage.mtp_weight, list):
        return jnp.float32(stage.mtp_weight)
    starts = jnp.asarray([change.step for change in stage.mtp_weight])
    weights = jnp.asarray([change.weight for change in stage.mtp_weight], jnp.float32)
    return weights[jnp.searchsorted(starts, step, side="right") - 1]


def loss_sums(
    params: Any, batch: Mapping[str, jax.Array], *, model: Decoder
) -> tuple[jax.Array, jax.Array]:
    """Sum of the trained tokens' negative log-likelihoods, and their number.

    Args:
      batch: `tokens`, `positions`, `segment_ids` and `trained`, each [rows, time].
    """
    log_probs = token_scores(params, **_inputs(batch), model=model).log_probs
    return _trained_sum(log_probs, batch), batch["trained"].astype(jnp.float32).sum()


def _trained_sum(log_probs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    return -jnp.sum(log_probs * batch["trained"].astype(jnp.float32))


def ahead_sums(
    scores: AheadScores, batch: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the trained tokens, with the module for multi-token prediction.

    Returns:
      The decoder's negative log-likelihoods and, of those tokens that `predicted_ahead` counts, the
      module's, and how many the module would draft as the decoder would choose (the acceptance of
      greedy drafts).
    """
    counted = predicted_ahead(batch).astype(jnp.float32)
    return (
        _trained_sum(scores.log_probs, batch),
        -jnp.sum(scores.ahead * counted),
        jnp.sum(scores.agrees * counted),
    )


def predicted_ahead(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Trained tokens with two others before them in their segment, bool [rows, time]."""
    return follows(batch["segment_ids"], 2) & (batch["trained"] > 0)


def _inputs(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: batch[name] for name in ("tokens", "positions", "segment_ids")}


def mean_loss(parts: Iterator[tuple[jax.Array, jax.Array]]) -> float:
    """The mean over all tokens of all parts, each given as its sum and its number of tokens."""
    totals = [(float(total), float(count)) for total, count in parts]
    return math.fsum(total for total, _ in totals) / max(math.fsum(n for _, n in totals), 1.0)
