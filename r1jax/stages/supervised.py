"""Pretraining and supervised fine-tuning: one update on packed rows, of texts or conversations.

`run_updates` is the loop of all stages that learn from given rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.data.packing import PackedRows, packed_once
from r1jax.models import (
    Decoder,
    Teacher,
    TokenRows,
    ahead_log_probs,
    distilled_log_probs,
    token_log_probs,
)
from r1jax.models.balance import imbalance_of, loads_of, make_after_update
from r1jax.models.decoder import Routings
from r1jax.models.log_probs import follows
from r1jax.models.parameters import Params, abstract_weights
from r1jax.objectives.normalisation import mean_weights
from r1jax.processes import process_batch_slice
from r1jax.programs import Planning, StagePrograms, TrainBatch, train_programs
from r1jax.programs.program import batch_array, token_arrays
from r1jax.run.datasets import Encode, RowKey
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import Beside, Resumable, TrainLoop, train_loop
from r1jax.settings.stage import EpochStage
from r1jax.stages.distillation import (
    AGREEMENT,
    DIVERGENCE,
    check_teacher,
    make_teacher,
    teacher_decoder,
)
from r1jax.stages.experts import check_experts
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.sft.settings import SFTStage
from r1jax.train_step import (
    LossOutput,
    Metrics,
    TrainState,
    make_optimizer,
    make_schedule,
    train_step,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


HostBatch = dict[str, np.ndarray]


class _BatchStream(Resumable, Protocol):
    """An endless stream of rows."""

    def take(self, n_global: int, /) -> HostBatch:
        """The next rows, this many over all processes; this process's share of them."""


# Figures of held-out rows.
Measure = Callable[[TrainLoop], dict[str, float]]


def run_updates(
    loop: TrainLoop,
    stage: PretrainStage | EpochStage,
    rows: _BatchStream,
    *,
    tokens_in: Callable[[HostBatch], int],
    held_out: Measure | None = None,
    shown: tuple[str, ...] = ("loss",),
) -> None:
    """Take the loop to its last step.

    Args:
      tokens_in: tokens of a batch over all processes, for the rate.
      held_out: called every `stage.held_out_every` steps and at the end.
      shown: metrics on the progress bar.
    """
    schedule = make_schedule(stage.optimizer, loop.steps)
    every = stage.held_out_every if isinstance(stage, EpochStage) else loop.steps
    seconds, tokens = 0.0, 0
    while loop.step < loop.steps:
        loop.begin_round()
        batch = rows.take(stage.rows_per_step)
        tokens += tokens_in(batch)
        rows_on_devices = loop.to_devices(batch)
        loop.clock.lap("data")
        metrics: dict[str, jax.Array | float] = {**loop.update(rows_on_devices)}
        seconds += loop.clock.lap("update")
        step, last = loop.step, loop.step == loop.steps
        measured = held_out is not None and (last or step % every == 0)
        if held_out is not None and measured:
            metrics |= held_out(loop)
            loop.clock.lap("held_out")
        if measured or last or step % stage.log_every == 0:
            metrics["optimizer/learning_rate"] = schedule(step - 1)
            loop.recorder.log(step, metrics)
            rate = tokens / seconds
            seconds, tokens = 0.0, 0
            loop.log_timings({"tokens_per_second/update": rate})
            figures = {name: float(metrics[name]) for name in shown}
            loop.progress.update(step, {**figures, "tokens_per_second": rate})
        loop.save_if_due(rows)


def packed_rows(
    stage: PretrainStage | SFTStage, run: StageRun, documents: tuple[list[RowKey], Encode]
) -> PackedRows[RowKey]:
    """The stage's documents in packed rows, this process's share of them."""
    share = process_batch_slice(run.layouts.training)
    return PackedRows(
        *documents,
        run.models.of(stage.name).tokenizer,
        row_tokens=stage.row_tokens,
        seed=seed_of(run.config.seed, stage.name),
        process_index=share.index,
        process_count=share.count,
    )


def run(stage: PretrainStage | SFTStage, run: StageRun) -> None:
    """Train on the dataset's texts, or conversations, resuming where a former process stopped."""
    model, held_out = run.models.of(stage.name), None
    teacher = teacher_decoder(stage, run)
    if isinstance(stage, SFTStage):
        rows = packed_rows(stage, run, run.datasets.conversations(stage.data, model))
        # Counting rows means encoding all of the data: only where the epochs ask for it.
        steps = stage.steps or stage.steps_for(rows.rows_per_epoch())
        held_out = _held_out_loss(stage, run)
    else:
        rows = packed_rows(stage, run, run.datasets.texts(stage.data, model))
        steps = stage.steps
    optimizer = make_optimizer(stage.optimizer, steps)
    update = make_update(stage, model.decoder, optimizer, teacher)
    tokens = stage.rows_per_step * stage.row_tokens
    beside = Beside(teacher=isinstance(stage, SFTStage) and stage.distillation is not None)
    with train_loop(stage, run, optimizer, update, rows, steps=steps, beside=beside) as loop:
        run_updates(loop, stage, rows, tokens_in=lambda _: tokens, held_out=held_out)
        if rows.dropped:
            loop.progress.print(
                f"{stage.name}: {rows.dropped} documents were longer than row_tokens = "
                f"{stage.row_tokens} and left out"
            )
        loop.finish()


def _held_out_loss(stage: SFTStage, run: StageRun) -> Measure | None:
    """Means over all tokens of the held-out dataset: of the loss, and of what compares the model
    with a teacher."""
    if stage.held_out is None:
        return None
    model, share = run.models.of(stage.name), process_batch_slice(run.layouts.training)
    documents = run.datasets.conversations(stage.held_out, model)
    sums_of = jax.jit(_make_loss_sums(stage, model.decoder, teacher_decoder(stage, run)))

    def measure(loop: TrainLoop) -> dict[str, float]:
        batches = packed_once(
            *documents,
            model.tokenizer,
            row_tokens=stage.row_tokens,
            rows_per_batch=stage.rows_per_step,
            process_index=share.index,
            process_count=share.count,
        )
        teacher = () if loop.teacher is None else (loop.teacher,)
        sums: list[dict[str, float]] = []
        counts = []
        for batch in batches:
            of_batch, count = sums_of(loop.state.params, loop.to_devices(batch), *teacher)
            sums.append({name: float(value) for name, value in of_batch.items()})
            counts.append(float(count))
        tokens = max(math.fsum(counts), 1.0)
        names = sums[0] if sums else ("loss",)
        return {f"held_out/{n}": math.fsum(each[n] for each in sums) / tokens for n in names}

    return measure


def check(stage: PretrainStage | SFTStage, run: ResolvedRun) -> None:
    """Settings about experts fit the model, and rows the template, the tokenizer and row_tokens."""
    model = run.models.of(stage.name)
    with run.config.blaming("stages", stage.name):
        check_experts(stage.balance, model.decoder.config)
    check_teacher(stage, run)
    for _, data in stage.datasets():
        conversations = isinstance(stage, SFTStage)
        run.datasets.check_documents(
            data,
            model,
            stage.name,
            conversations=conversations,
            row_tokens=stage.row_tokens,
        )


def programs(stage: PretrainStage | SFTStage, planning: Planning) -> StagePrograms:
    """The update on packed rows, and the loss on held-out rows."""
    model = planning.decoder_of(stage.name)
    # The number of steps only shapes the learning rate.
    optimizer = make_optimizer(stage.optimizer, stage.steps or 1)
    rows, shape = packed_arrays(stage, model), (stage.rows_per_step, stage.row_tokens)
    teacher = teacher_decoder(stage, planning)
    update, batch = (
        make_update(stage, model, optimizer, teacher),
        TrainBatch(rows, *shape, stage.micro_batches, teacher),
    )
    with_module = bool(stage.mtp_weight)
    held_out = None
    if isinstance(stage, SFTStage) and stage.held_out is not None:
        read = (rows,) if teacher is None else (rows, abstract_weights(teacher))
        held_out = jax.jit(_make_loss_sums(stage, model, teacher)), read
    return train_programs(
        update, optimizer, model, batch, with_module=with_module, held_out=held_out
    )


def packed_arrays(
    stage: PretrainStage | SFTStage, model: Decoder
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of packed rows, abstract."""
    shape = (stage.rows_per_step, stage.row_tokens)
    return {**token_arrays(model, *shape), "trained": batch_array(model, shape, jnp.bool_)}


class _Weights(NamedTuple):
    """Of each row, all equal: of the next token's sum, of the module's, and of the imbalance's."""

    loss: Float[Array, " rows"]
    ahead: Float[Array, " rows"]
    imbalance: Float[Array, " rows"]


def make_update(
    stage: PretrainStage | SFTStage,
    model: Decoder,
    optimizer: optax.GradientTransformation,
    teacher: Decoder | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One update on packed rows: `tokens`, `positions`, `segment_ids` and `trained`.

    Its `loss` is the next token's, whatever else is trained.

    Args:
      teacher: of a stage that distils, whose update has its weights as a third argument.

    Raises:
      ValueError: the stage asks for something about experts that the model has no use for.
    """
    check_experts(stage.balance, model.config)
    with_module, balance = bool(stage.mtp_weight), stage.balance.sequence_loss > 0
    after_update = make_after_update(stage.balance, model.config)
    section = stage.distillation if isinstance(stage, SFTStage) else None
    teacher_of = make_teacher(stage, teacher)

    def loss_fn(
        params: Params,
        rows: tuple[Mapping[str, jax.Array], _Weights],
        teacher: Teacher | None = None,
    ) -> LossOutput:
        batch, weights = rows
        count = batch["trained"].sum()
        if teacher is not None and section is not None:
            sums, routings = _distilled_sums(params, batch, model, teacher, balance=balance)
            means = {name: (total, count) for name, total in sums.items()}
            loss = weights.loss[0] * (
                section.coefficient * sums[DIVERGENCE]
                + section.cross_entropy_coefficient * sums["loss"]
            )
        elif with_module:
            ahead_of = ahead_log_probs(params, _token_rows(batch), model, balance=balance)
            counted = _predicted_ahead(batch)
            total, ahead_count = _trained_sum(ahead_of.log_probs, batch), jnp.sum(counted)
            ahead = -jnp.sum(ahead_of.ahead * counted.astype(jnp.float32))
            # Drafts that are what the decoder would choose: the acceptance of greedy ones.
            agreed = jnp.sum(ahead_of.agrees * counted.astype(jnp.float32))
            means = {
                "loss": (total, count),
                "mtp/loss": (ahead, ahead_count),
                "mtp/acceptance": (agreed, ahead_count),
            }
            loss, routings = total * weights.loss[0] + ahead * weights.ahead[0], ahead_of.routings
        else:
            log_probs, _, routings = token_log_probs(
                params, _token_rows(batch), model, balance=balance
            )
            total = _trained_sum(log_probs, batch)
            means = {"loss": (total, count)} if balance else {}
            loss = total * weights.loss[0]
        loads = loads_of(routings)
        if balance:
            imbalance = imbalance_of(routings).sum()
            layers = sum(len(load) for load in loads.values())
            means["experts/imbalance"] = (imbalance, _sequences(batch) * layers)
            loss = loss + imbalance * weights.imbalance[0]
        return LossOutput(loss, {"tokens/trained": count.astype(jnp.float32)}, means, counts=loads)

    def step(
        state: TrainState, batch: Mapping[str, jax.Array], *teacher_weights: Params
    ) -> tuple[TrainState, Metrics]:
        rows = stage.rows_per_step
        weights = _Weights(
            mean_weights(rows, batch["trained"].sum()),
            mean_weights(rows, jnp.sum(_predicted_ahead(batch)), mtp_weight(stage, state.step)),
            mean_weights(rows, _sequences(batch), stage.balance.sequence_loss),
        )
        return train_step(
            state,
            (batch, weights),
            loss_fn
            if teacher_of is None
            else partial(loss_fn, teacher=teacher_of(*teacher_weights)),
            optimizer,
            micro_batches=stage.micro_batches,
            after_update=after_update,
        )

    return step


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


def _distilled_sums(
    params: Params,
    batch: Mapping[str, jax.Array],
    model: Decoder,
    teacher: Teacher,
    *,
    balance: bool = False,
) -> tuple[dict[str, jax.Array], Routings]:
    """Sums over the trained tokens by the names of metrics, where `loss` is their negative
    log-likelihood; and the routings."""
    tokens = distilled_log_probs(
        *(params, _token_rows(batch), model, teacher),
        wanted=batch["trained"] > 0,
        balance=balance,
    )
    sums = {
        "loss": -jnp.sum(tokens.log_probs),
        DIVERGENCE: jnp.sum(tokens.comparison.divergence),
        AGREEMENT: jnp.sum(tokens.comparison.agrees),
    }
    return sums, tokens.routings


def _make_loss_sums(
    stage: SFTStage, model: Decoder, teacher: Decoder | None
) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]]:
    """`loss_sums(params, batch)`: sums over the trained tokens, and their number.

    The batch has `tokens`, `positions`, `segment_ids` and `trained`, each [rows, time]. Of a stage
    that distils, the teacher's weights are a third argument.
    """
    teacher_of = make_teacher(stage, teacher)

    def loss_sums(
        params: Params, batch: Mapping[str, jax.Array], *teacher_weights: Params
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        count = batch["trained"].astype(jnp.float32).sum()
        if teacher_of is not None:
            return _distilled_sums(params, batch, model, teacher_of(*teacher_weights))[0], count
        log_probs = token_log_probs(params, _token_rows(batch), model).log_probs
        return {"loss": _trained_sum(log_probs, batch)}, count

    return loss_sums


def _trained_sum(log_probs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    return -jnp.sum(log_probs * batch["trained"].astype(jnp.float32))


def _predicted_ahead(batch: Mapping[str, jax.Array]) -> jax.Array:
    """Trained tokens with two others before them in their segment, bool [rows, time]."""
    return follows(batch["segment_ids"], 2) & (batch["trained"] > 0)


def _token_rows(batch: Mapping[str, jax.Array]) -> TokenRows:
    return TokenRows(batch["tokens"], batch["positions"], batch["segment_ids"])
