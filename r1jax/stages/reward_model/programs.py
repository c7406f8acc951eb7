"""What training a reward model compiles: the update and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.data.preferences import EncodedPreference, preference_arrays
from r1jax.models import Decoder
from r1jax.models.parameters import Params
from r1jax.models.reward_head import reward_scores
from r1jax.objectives.normalisation import row_weights
from r1jax.objectives.preference_loss import pairwise_loss, pointwise_loss
from r1jax.programs import Planning, StagePrograms, TrainBatch, train_programs
from r1jax.programs.arrays import batch_array, batch_arrays_like, round_up
from r1jax.programs.flops import forward_flops
from r1jax.programs.update import with_held_out_loss
from r1jax.run.optimizer import make_optimizer
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.train_step import LossOutput, Metrics, TrainStep, make_train_step

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

# A batch of `preference_arrays`, and the weight of each row.
WeightedRows = tuple[Mapping[str, jax.Array], jax.Array]


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
    training = train_programs(make_update(stage, model, optimizer), optimizer, model, batch)
    if stage.held_out is None:
        return training
    loss = jax.jit(partial(weighted_loss, model=model))
    weights = batch_array(model, (stage.rows_per_step,), jnp.float32)
    forward = forward_flops(model.config, texts, stage.max_tokens)
    return with_held_out_loss(training, loss, (arrays, weights), forward)


def make_update(
    stage: RewardModelStage, model: Decoder, optimizer: optax.GradientTransformation
) -> TrainStep[Mapping[str, jax.Array]]:
    """One update on a batch of `preference_arrays`."""

    def weigh(batch: Mapping[str, jax.Array], step: Int[Array, ""]) -> WeightedRows:
        return batch, row_weights(jnp.ones(batch["ends"].shape[0]))

    def loss_fn(params: Params, rows: WeightedRows) -> LossOutput:
        batch, weights = rows
        return LossOutput(*weighted_loss(params, batch, weights, model=model))

    return make_train_step(weigh, loss_fn, optimizer, micro_batches=stage.micro_batches)


def weighted_loss(
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
