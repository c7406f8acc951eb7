"""Supervised fine-tuning on the assistant's part of conversations."""

from __future__ import annotations

import math
from functools import partial

import jax

from r1jax.data import packed_once
from r1jax.models.balance import check_experts
from r1jax.processes import process_batch_slice
from r1jax.programs import Planning, StagePrograms
from r1jax.programs.program import forward_flops, with_held_out_loss
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.train_loop import TrainLoop
from r1jax.stages import supervised
from r1jax.stages.sft.settings import SFTStage
from r1jax.stages.supervised import (
    HeldOut,
    loss_sums,
    packed_arrays,
    packed_rows,
    train_on_packed_rows,
)


def check(stage: SFTStage, run: ResolvedRun) -> None:
    """Settings about experts fit the model."""
    check_experts(stage.name, stage.balance, run.models.of(stage.name).decoder.config)


def run(stage: SFTStage, run: StageRun) -> None:
    """Train on the dataset's conversations, resuming where a former process stopped."""
    conversations = run.datasets.conversations(stage.data, run.models.of(stage.name))
    rows = packed_rows(stage, run, conversations)
    # Counting rows means encoding all of the data: only where the epochs ask for it.
    steps = stage.steps or stage.steps_for(rows.rows_per_epoch())
    train_on_packed_rows(stage, run, rows, steps, _held_out_loss(stage, run))


def _held_out_loss(stage: SFTStage, run: StageRun) -> HeldOut | None:
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

    return HeldOut(stage.held_out_every, measure)


def programs(stage: SFTStage, planning: Planning) -> StagePrograms:
    training = supervised.programs(stage, planning)
    if stage.held_out is None:
        return training
    model = planning.decoder_of(stage.name)
    loss = jax.jit(partial(loss_sums, model=model))
    rows = packed_arrays(stage, model)
    forward = forward_flops(model.config, stage.rows_per_step, stage.row_tokens)
    return with_held_out_loss(training, loss, (rows,), forward)
