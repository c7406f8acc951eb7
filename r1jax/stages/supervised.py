"""The loop of supervised training: take a batch, update, measure held-out rows, log, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from r1jax.data import PackedRows
from r1jax.processes import process_batch_slice
from r1jax.run.datasets import Encode, RowKey
from r1jax.run.optimizer import make_optimizer, make_schedule
from r1jax.run.resolve import StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import Resumable, TrainLoop, train_loop
from r1jax.settings.stage import EpochStage
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.sft.settings import SFTStage
from r1jax.stages.supervised_programs import make_update

HostBatch = dict[str, np.ndarray]


class _BatchStream(Resumable, Protocol):
    """An endless stream of rows."""

    def take(self, n_global: int, /) -> HostBatch:
        """The next rows, this many over all processes; this process's share of them."""


@dataclass(frozen=True)
class HeldOut:
    """What is measured of held-out rows, every so many steps and at the end."""

    every: int
    measure: Callable[[TrainLoop], dict[str, float]]


def run_updates(
    loop: TrainLoop,
    stage: PretrainStage | EpochStage,
    rows: _BatchStream,
    *,
    tokens_in: Callable[[HostBatch], int],
    held_out: HeldOut | None = None,
    shown: tuple[str, ...] = ("loss",),
) -> None:
    """Take the loop to its last step, and export the weights.

    Args:
      tokens_in: tokens of a batch over all processes, for the rate.
      shown: metrics on the progress bar.
    """
    schedule = make_schedule(stage.optimizer, loop.steps)
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
        measured = held_out is not None and (last or step % held_out.every == 0)
        if held_out is not None and measured:
            metrics |= held_out.measure(loop)
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


def train_on_packed_rows(
    stage: PretrainStage | SFTStage,
    run: StageRun,
    rows: PackedRows[RowKey],
    steps: int,
    held_out: HeldOut | None = None,
) -> None:
    """Train the stage's model, resuming where a former process stopped."""
    optimizer = make_optimizer(stage.optimizer, steps)
    update = make_update(stage, run.models.of(stage.name).decoder, optimizer)
    tokens = stage.rows_per_step * stage.row_tokens
    with train_loop(stage, run, optimizer, update, rows, steps=steps) as loop:
        run_updates(loop, stage, rows, tokens_in=lambda _: tokens, held_out=held_out)
        if rows.dropped:
            loop.progress.print(
                f"{stage.name}: {rows.dropped} documents were longer than row_tokens = "
                f"{stage.row_tokens} and left out"
            )
        loop.finish()
