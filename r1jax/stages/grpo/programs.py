"""What reinforcement learning compiles: log-probs and the update; the sampler has its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from r1jax.grpo import GRPOBatch, PolicyOutputs, make_grpo_step
from r1jax.models import Decoder, token_scores
from r1jax.models.log_probs import routed_scores
from r1jax.models.parameters import Params
from r1jax.run.expert_balance import check_experts, imbalance_of, loads_of, make_after_update
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.train_step import TrainStep, map_micro_batches


def make_score(stage: GRPOStage, model: Decoder) -> Callable[[Any, Any], jax.Array]:
    """`score(params, inputs)`: the log-probs [N, T] of all tokens under these weights."""

    def score(params: Any, inputs: Any) -> jax.Array:
        def part(inputs: Any) -> jax.Array:
            temperature = stage.sampling.temperature
            return token_scores(params, **inputs, model=model, temperature=temperature).log_probs

        return map_micro_batches(part, inputs, stage.micro_batches)

    return score


def make_update(
    stage: GRPOStage, model: Decoder, optimizer: optax.GradientTransformation
) -> TrainStep[GRPOBatch]:
    """One GRPO update of the stage's policy.

    Raises:
      ValueError: the stage asks for something about experts that the model has no use for.
    """
    check_experts(stage.name, stage.balance, model.config, replay_experts=stage.replay_experts)
    balance = stage.balance.sequence_loss

    def log_prob_fn(params: Params, batch: GRPOBatch) -> PolicyOutputs:
        temperature = stage.sampling.temperature
        scores, routings = routed_scores(
            params, **batch.inputs, model=model, temperature=temperature, balance=balance > 0
        )
        penalty = balance * imbalance_of(routings) if balance else None
        return PolicyOutputs(*scores, penalty, loads_of(routings))

    return make_grpo_step(
        log_prob_fn,
        optimizer,
        stage.loss,
        micro_batches=stage.micro_batches,
        after_update=make_after_update(stage.balance, model.config),
    )
