"""Training a reward model: helpful from pairs, safety from labels (DeepSeek-R1, 2501.12948 v2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.data.padded_rows import padded_once, round_up
from r1jax.data.preferences import EncodedPreference, preference_arrays
from r1jax.models import Decoder
from r1jax.models.parameters import Params
from r1jax.models.reward_head import reward_scores
from r1jax.objectives.normalisation import row_weights
from r1jax.objectives.preference_loss import pairwise_loss, pointwise_loss
from r1jax.processes import process_batch_slice
from r1jax.programs import Planning, StagePrograms, TrainBatch, train_programs
from r1jax.programs.program import (
    batch_array,
    batch_arrays_like,
)
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.train_loop import TrainLoop
from r1jax.stages.padded_rows import run_on_padded_rows
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.stages.supervised import Measure
from r1jax.train_step import LossOutput, Metrics, TrainState, TrainStep, make_optimizer, train_step
from r1jax.weights import hugging_face

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def check(stage: RewardModelStage, run: ResolvedRun) -> None:
    """The tokenizer has a padding token, and the rows are preferences that can be learnt from."""
    model = run.models.of(stage.name)
    hugging_face.check_padding(model.tokenizer, model.generation_config)
    for _, data in stage.datasets():
        _preferences(stage, data, run)


def run(stage: RewardModelStage, run: StageRun) -> None:
    """Train on preference rows, resuming where a former process stopped."""
    run_on_padded_rows(
        stage,
        run,
        load=_preferences,
        to_arrays=preference_arrays,
        make_update=make_update,
        held_out=_held_out_metrics,
    )


def _preferences(
    stage: RewardModelStage, data: str, run: ResolvedRun
) -> tuple[list[EncodedPreference], str]:
    tokenizer = run.models.of(stage.name).tokenizer
    return run.datasets.preferences(data, stage.reward_model_format(), tokenizer)


def _held_out_metrics(
    stage: RewardModelStage, run: StageRun, rows: Sequence[EncodedPreference]
) -> Measure:
    """Loss and accuracy over all held-out rows."""
    share = process_batch_slice(run.layouts.training)
    sums_of = jax.jit(partial(_weighted_loss, model=run.models.of(stage.name).decoder))

    def measure(loop: TrainLoop) -> dict[str, float]:
        totals: dict[str, float] = {}
        for arrays, real in padded_once(
            rows,
            preference_arrays,
            rows_per_batch=stage.rows_per_step,
            length_bucket=stage.length_bucket,
            process_index=share.index,
            process_count=share.count,
        ):
            on_devices = loop.to_devices((arrays, real / np.float32(len(rows))))
            loss, figures = sums_of(loop.state.params, *on_devices)
            for name, value in {"loss": loss, **figures}.items():
                totals[f"held_out/{name}"] = totals.get(f"held_out/{name}", 0.0) + float(value)
        return totals

    return measure


def programs(stage: RewardModelStage, planning: Planning) -> StagePrograms:
    """The update, and the loss on held-out rows."""
    model = planning.decoder_of(stage.name)
    text = np.zeros(stage.max_tokens, np.int32)
    pairs = stage.loss == "pairwise"
    row = EncodedPreference(0, (text, text) if pairs else (text,), None if pairs else True)
    time = round_up(stage.max_tokens, stage.length_bucket)
    arrays = batch_arrays_like(preference_arrays([row] * stage.rows_per_step, time), model)
    texts = stage.rows_per_step * len(row.texts)
    batch = TrainBatch(arrays, texts, stage.max_tokens, stage.micro_batches)
    # The number of steps only shapes the learning rate.
    optimizer = make_optimizer(stage.optimizer, stage.steps or 1)
    held_out = None
    if stage.held_out is not None:
        weights = batch_array(model, (stage.rows_per_step,), jnp.float32)
        held_out = jax.jit(partial(_weighted_loss, model=model)), (arrays, weights)
    update = make_update(stage, model, optimizer)
    return train_programs(update, optimizer, model, batch, held_out=held_out)


def make_update(
    stage: RewardModelStage, model: Decoder, optimizer: optax.GradientTransformation
) -> TrainStep[Mapping[str, jax.Array]]:
    """One update on a batch of `preference_arrays`."""

    def loss_fn(
        params: Params, rows: tuple[Mapping[str, jax.Array], Float[Array, " rows"]]
    ) -> LossOutput:
        return LossOutput(*_weighted_loss(params, *rows, model=model))

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        rows = batch, row_weights(jnp.ones(batch["ends"].shape[0]))
        return train_step(state, rows, loss_fn, optimizer, micro_batches=stage.micro_batches)

    return step


def _weighted_loss(
    params: Params,
    batch: Mapping[str, jax.Array],
    weights: Float[Array, " rows"],
    *,
    model: Decoder,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch, and its other figures, each summed by weight.

    Args:
      batch: arrays of `preference_arrays`; with `safe`, labelled responses, else pairs.
    """
    inputs = {name: batch[name] for name in ("tokens", "positions", "segment_ids", "ends")}
    if "safe" in batch:
        return pointwise_loss(reward_scores(params, **inputs, model=model), batch["safe"], weights)
    rows = batch["ends"].shape[0]
    flat = {name: leaf.reshape(2 * rows, *leaf.shape[2:]) for name, leaf in inputs.items()}
    scores = reward_scores(params, **flat, model=model).reshape(rows, 2)
    return pairwise_loss(scores[:, 0], scores[:, 1], weights)
