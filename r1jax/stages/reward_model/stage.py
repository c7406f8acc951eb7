"""Training a reward model: helpful from pairs, safety from labels (DeepSeek-R1, 2501.12948 v2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from r1jax.data.preferences import (
    EncodedPreference,
    PreferenceIterator,
    encode_preferences,
    load_labelled,
    load_pairs,
    preference_arrays,
)
from r1jax.processes import BatchSlice, process_batch_slice
from r1jax.run.context import Context
from r1jax.run.optimizer import make_optimizer, make_schedule
from r1jax.run.train_loop import TrainLoop
from r1jax.stages.reward_model.programs import make_update, weighted_loss
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.train_step import Metrics

if TYPE_CHECKING:
    pass


def run_reward_model(stage: RewardModelStage, context: Context, directory: Path) -> None:
    """Train on preference rows, resuming where a former process stopped."""
    model = context.model_of(stage.name).decoder
    share = process_batch_slice(context.layout)
    encoded, report = preferences(stage, stage.data, context)
    rows = PreferenceIterator(
        encoded,
        seed=context.seed(stage.name),
        length_bucket=stage.length_bucket,
        process_index=share.index,
        process_count=share.count,
    )
    steps = stage.steps_for(len(encoded))
    held_out: list[EncodedPreference] = []
    if stage.held_out is not None:
        held_out, held_out_report = preferences(stage, stage.held_out, context)
        report = f"{report}; held out: {held_out_report}"
    schedule = make_schedule(stage.optimizer, steps)
    optimizer = make_optimizer(stage.optimizer, steps)
    update = make_update(stage, model, optimizer)

    @jax.jit
    def measure(params: Any, batch: Any, weights: jax.Array) -> tuple[jax.Array, Metrics]:
        return weighted_loss(params, batch, weights, model=model)

    with TrainLoop(stage, context, directory, steps, optimizer, update) as loop:
        loop.restore(rows)
        loop.progress.print(f"{stage.name}: {report}")
        seconds, tokens = 0.0, 0
        while loop.step < steps:
            loop.begin_round()
            batch = rows.take(stage.rows_per_step)
            tokens += share.count * int((batch["segment_ids"] > 0).sum())
            placed = loop.place(batch)
            loop.clock.lap("data")
            metrics = loop.update(placed)
            seconds += loop.clock.lap("update")
            step = loop.step
            due = step % stage.held_out_every == 0 or step == steps
            if held_out and due:
                metrics |= held_out_figures(stage, held_out, share, loop, measure)
                loop.clock.lap("held_out")
            if step % stage.log_every == 0 or step == steps or (held_out and due):
                metrics["optimizer/learning_rate"] = schedule(step - 1)
                loop.recorder.log(step, metrics)
                rate = tokens / seconds
                seconds, tokens = 0.0, 0
                loop.log_timings({"tokens_per_second/update": rate})
                loop.progress.update(
                    step,
                    {
                        "loss": float(metrics["loss"]),
                        "accuracy": float(metrics["accuracy"]),
                        "tokens_per_second": rate,
                    },
                )
            loop.save_if_due(rows)
        loop.finish()


def preferences(
    stage: RewardModelStage, data: str, context: Context
) -> tuple[list[EncodedPreference], str]:
    """The encoded rows of a dataset, and what to tell of them; made once in a run."""
    key = (stage.name, data)
    if key in context.preferences:
        return context.preferences[key]
    section = context.config.data[data]
    rows = load_pairs(section) if stage.loss == "pairwise" else load_labelled(section)
    encoded, report = encode_preferences(
        rows,
        section,
        context.model_of(stage.name).tokenizer,
        reads=stage.reads,
        max_tokens=stage.max_tokens,
    )
    context.preferences[key] = encoded, str(report)
    return context.preferences[key]


def held_out_figures(
    stage: RewardModelStage,
    rows: Sequence[EncodedPreference],
    share: BatchSlice,
    loop: TrainLoop,
    measure: Any,
) -> dict[str, float]:
    """Loss and accuracy over all held-out rows, in batches of one size."""
    longest = max(len(text) for row in rows for text in row.texts)
    row_tokens = -(-longest // stage.length_bucket) * stage.length_bucket
    own = stage.rows_per_step // share.count
    totals: dict[str, float] = {}
    for start in range(0, len(rows), stage.rows_per_step):
        batch = rows[start : start + stage.rows_per_step]
        filled = [*batch, *[batch[-1]] * (stage.rows_per_step - len(batch))]
        mine = slice(share.index * own, (share.index + 1) * own)
        weights = [1 / len(rows)] * len(batch) + [0.0] * (stage.rows_per_step - len(batch))
        arrays = preference_arrays(filled[mine], row_tokens)
        place = loop.place({"rows": arrays, "weights": jnp.asarray(weights[mine])})
        loss, figures = measure(loop.state.params, place["rows"], place["weights"])
        for name, value in {"loss": loss, **figures}.items():
            totals[f"held_out/{name}"] = totals.get(f"held_out/{name}", 0.0) + float(value)
    return totals
