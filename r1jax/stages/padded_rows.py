"""The loop of stages that learn from padded rows of labelled texts: both kinds of reward models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import optax

from r1jax.data.padded_rows import EncodedRow, HostArrays, PaddedRows
from r1jax.models import Decoder
from r1jax.processes import process_batch_slice
from r1jax.run.resolve import StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.train_loop import train_loop
from r1jax.stages.process_reward_model.settings import ProcessRewardModelStage
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.stages.supervised import Measure, run_updates
from r1jax.train_step import TrainStep, make_optimizer

R = TypeVar("R", bound=EncodedRow)
S = TypeVar("S", RewardModelStage, ProcessRewardModelStage)


def run_on_padded_rows(
    stage: S,
    run: StageRun,
    *,
    load: Callable[[S, str, StageRun], tuple[Sequence[R], str]],
    to_arrays: Callable[[Sequence[R], int], HostArrays],
    make_update: Callable[
        [S, Decoder, optax.GradientTransformation], TrainStep[Mapping[str, jax.Array]]
    ],
    held_out: Callable[[S, StageRun, Sequence[R]], Measure],
) -> None:
    """Train on all rows of the stage's data, resuming where a former process stopped.

    Args:
      load: the rows of a dataset, by its name, and a sentence about them.
      held_out: what measures the model on rows that it does not learn from.
    """
    share = process_batch_slice(run.layouts.training)
    rows, report = load(stage, stage.data, run)
    stream = PaddedRows(
        rows,
        to_arrays,
        seed=seed_of(run.config.seed, stage.name),
        length_bucket=stage.length_bucket,
        process_index=share.index,
        process_count=share.count,
    )
    measure = None
    if stage.held_out is not None:
        others, others_report = load(stage, stage.held_out, run)
        report = f"{report}; held out: {others_report}"
        measure = held_out(stage, run, others)
    steps = stage.steps_for(len(rows))
    optimizer = make_optimizer(stage.optimizer, steps)
    update = make_update(stage, run.models.of(stage.name).decoder, optimizer)
    with train_loop(stage, run, optimizer, update, stream, steps=steps) as loop:
        loop.progress.print(f"{stage.name}: {report}")
        run_updates(
            loop,
            stage,
            stream,
            tokens_in=lambda batch: share.count * int((batch["segment_ids"] > 0).sum()),
            held_out=measure,
            shown=("loss", "accuracy"),
        )
        loop.finish()
