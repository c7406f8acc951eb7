"""Supervised training on packed rows: pretraining on texts, fine-tuning on conversations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.data import PackedRows, packed_once
from r1jax.processes import process_batch_slice
from r1jax.run.context import Context
from r1jax.run.optimizer import make_optimizer, make_schedule
from r1jax.run.train_loop import TrainLoop
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.sft.settings import SFTStage
from r1jax.stages.supervised_programs import loss_sums, make_update

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
                loop.progress.update(
                    step, {"loss": float(metrics["loss"]), "tokens_per_second": rate}
                )
            loop.save_if_due(rows)
        if rows.dropped:
            loop.progress.print(
                f"{stage.name}: {rows.dropped} documents were longer than row_tokens = "
                f"{stage.row_tokens} and left out"
            )
        loop.finish()


def mean_loss(parts: Iterator[tuple[jax.Array, jax.Array]]) -> float:
    """The mean over all tokens of all parts, each given as its sum and its number of tokens."""
    totals = [(float(total), float(count)) for total, count in parts]
    return math.fsum(total for total, _ in totals) / max(math.fsum(n for _, n in totals), 1.0)
