"""Supervised fine-tuning on the assistant's part of conversations."""

from __future__ import annotations

import math
from functools import partial

import jax

from r1jax.data import packed_once
from r1jax.processes import process_batch_slice
from r1jax.run.resolve import StageRun
from r1jax.run.train_loop import TrainLoop
from r1jax.stages.sft.settings import SFTStage
from r1jax.stages.supervised import (
    Measure,
    check,
    loss_sums,
    packed_rows,
    programs,
    train_on_packed_rows,
)

__all__ = ["check", "programs", "run"]


def run(stage: SFTStage, run: StageRun) -> None:
    """Train on the dataset's conversations, resuming where a former process stopped."""
    conversations = run.datasets.conversations(stage.data, run.models.of(stage.name))
    rows = packed_rows(stage, run, conversations)
    # Counting rows means encoding all of the data: only where the epochs ask for it.
    steps = stage.steps or stage.steps_for(rows.rows_per_epoch())
    train_on_packed_rows(stage, run, rows, steps, _held_out_loss(stage, run))


def _held_out_loss(stage: SFTStage, run: StageRun) -> Measure | None:
    """The mean over all tokens of the held-out dataset."""
    if stage.held_out is None:
        return None
    model, share = run.models.of(stage.name), process_batch_slice(run.layouts.training)
    documents = run.datasets.conversations(stage.held_out, model)
    sums_of = jax.jit(partial(loss_sums, model=model.decoder))

    def measure(loop: TrainLoop) -> dict[str, float]:
        batches = packed_once(
            *documents,
            model.tokenizer,
            row_tokens=stage.row_tokens,
            rows_per_batch=stage.rows_per_step,
            process_index=share.index,
            process_count=share.count,
        )
        losses, counts = [], []
        for batch in batches:
            loss, count = sums_of(loop.state.params, loop.to_devices(batch))
            losses.append(float(loss))
            counts.append(float(count))
        return {"held_out/loss": math.fsum(losses) / max(math.fsum(counts), 1.0)}

    return measure
