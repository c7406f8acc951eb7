"""The reward models of a stage: what they keep in memory, and the scoring of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from r1jax.data.preferences import pad_texts
from r1jax.models import Decoder
from r1jax.programs.arrays import abstract_weights, batch_arrays_like
from r1jax.programs.flops import forward_flops
from r1jax.programs.program import Planning, Program
from r1jax.rollouts.scoring import make_score, row_tokens, rows_at_once
from r1jax.settings.stage import Stage

if TYPE_CHECKING:
    from r1jax.programs.arrays import AbstractTree


class RewardModel(NamedTuple):
    """A reward's model; as_probability: its output becomes the probability of a safe response."""

    decoder: Decoder
    as_probability: bool


def reward_models(stage: Stage, planning: Planning) -> dict[str, RewardModel]:
    """Reward -> its model, of the stage's rewards that have one."""
    formats = {each.name: each.reward_model_format() for each in planning.config.stages}
    models: dict[str, RewardModel] = {}
    for name, reward in planning.config.rewards_of(stage).items():
        if reward.model is not None:
            trained = formats.get(reward.model)
            labelled = trained is not None and trained.labelled
            models[name] = RewardModel(planning.decoder_of(reward.model), labelled)
    return models


def reward_model_weights(models: Mapping[str, RewardModel]) -> dict[str, AbstractTree]:
    """What they keep in memory, for `Program.resident`."""
    return {"reward models": [abstract_weights(model.decoder) for model in models.values()]}


def reward_programs(
    models: Mapping[str, RewardModel],
    tokens: int,
    samples: int,
    resident: Mapping[str, AbstractTree],
) -> Iterator[Program]:
    """Scores of that many samples of that many tokens, each of which every model reads."""
    for name, (model, as_probability) in models.items():
        rows = rows_at_once(model.layout)
        texts = [np.zeros(1, np.int32)] * rows
        inputs = batch_arrays_like(pad_texts(texts, row_tokens(tokens)), model)
        weights = abstract_weights(model)
        score = jax.jit(make_score(model, as_probability))
        others = {key: other for key, other in models.items() if key != name}
        yield Program(
            f"reward {name}",
            model.layout.mesh.shape,
            partial(score.lower, weights, inputs),
            {"reward models": weights, "batch": inputs},
            {**resident, **reward_model_weights(others)},
            calls=samples / rows,
            useful_flops=forward_flops(model.config, rows, tokens),
        )
