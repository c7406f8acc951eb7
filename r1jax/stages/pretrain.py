"""Next-token prediction on packed rows: how the demo gets its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.config.schema import PretrainStage
from r1jax.data import PackedRows
from r1jax.grpo import accumulate_gradients, apply_if_finite
from r1jax.models import token_scores
from r1jax.processes import batch_share
from r1jax.stages.context import Context
from r1jax.stages.loop import TrainLoop
from r1jax.stages.optimizer import make_optimizer, make_schedule


def run_pretrain(stage: PretrainStage, context: Context, directory: Path) -> None:
    """Train on the dataset's texts, resuming where a former process stopped."""
    language_model = context.model_of(stage.name)
    model = language_model.decoder
    share = batch_share(model.layout)
    rows = PackedRows(
        context.examples(stage.data),
        language_model.tokenizer,
        row_tokens=stage.row_tokens,
        seed=context.seed(stage.name),
        process_index=share.index,
        process_count=share.count,
    )
    schedule = make_schedule(stage.optimizer, stage.steps)
    optimizer = make_optimizer(stage.optimizer, stage.steps)

    def loss_fn(params: Any, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        batch, weights = part
        scores = token_scores(params, **batch, model=model)
        return -jnp.sum(scores.log_probs * weights), {}

    def update(state: Any, batch: Any) -> Any:
        ids = batch["segment_ids"]
        # As in token_scores: a document's first token follows nothing, so it is not predicted.
        follows = jnp.pad((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0), ((0, 0), (1, 0)))
        weights = follows / jnp.maximum(follows.sum(), 1)
        loss, gradients, _ = accumulate_gradients(
            loss_fn, state.params, (batch, weights), stage.micro_batches
        )
        return apply_if_finite(state, loss, gradients, optimizer)

    with TrainLoop(stage, context, directory, optimizer, update) as loop:
        loop.restore(rows)
        seconds = 0.0
        while loop.step < stage.steps:
            batch = loop.place(rows.take(stage.rows_per_step))
            loop.clock.lap("data")
            metrics = loop.update(batch)
            seconds += loop.clock.lap("update")
            step = loop.step
            if step % stage.log_every == 0 or step == stage.steps:
                metrics["optimizer/learning_rate"] = schedule(step - 1)
                loop.recorder.log(step, metrics)
                rate = stage.log_every * stage.rows_per_step * stage.row_tokens / seconds
                seconds = 0.0
                loop.log_timings({"tokens_per_second/update": rate})
                loop.progress.update(step, loss=float(metrics["loss"]), tokens_per_second=rate)
            loop.save_if_due(rows)
        loop.finish()
