"""A train stage's settings for the balance of experts, as parts of its update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from r1jax.models import ModelConfig
from r1jax.models.balance import Loads, load_figures, move_biases
from r1jax.models.decoder import Routings
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.sft.settings import SFTStage
from r1jax.train_step import AfterUpdate

BalancedStage = PretrainStage | SFTStage | GRPOStage


def check_experts(stage: BalancedStage, config: ModelConfig) -> None:
    """Raises ValueError for a setting about experts that the model has no use for."""
    where, balance = f"stages.{stage.name}", stage.balance
    asked = {
        "balance.bias_speed": balance.bias_speed,
        "balance.sequence_loss": balance.sequence_loss,
    }
    if isinstance(stage, GRPOStage):
        asked["replay_experts"] = stage.replay_experts
    for key, value in asked.items():
        if value and config.experts is None:
            raise ValueError(
                f"{where}.{key} = {value}: the model ({config.architecture}) has no experts; leave "
                "it out"
            )
    if balance.bias_speed and config.experts is not None and not config.experts.biased:
        raise ValueError(
            f"{where}.balance.bias_speed = {balance.bias_speed}: with topk_method = "
            f"{config.experts.topk_method!r} the model has no biases; use balance.sequence_loss"
        )


def loads_of(routings: Routings) -> Loads:
    """Stack of layers -> how many tokens chose each expert, [layers, experts]."""
    return {name: routing.load for name, routing in routings.items()}


def imbalance_of(routings: Routings) -> jax.Array:
    """Of each row, summed over its sequences and the layers, float32 [rows]."""
    return jnp.sum(jnp.concatenate([each.imbalance for each in routings.values()]), axis=0)


def make_after_update(stage: BalancedStage) -> AfterUpdate:
    """What follows the optimizer: the biases move, and the experts' load is told."""

    def after_update(params: Any, loads: Loads) -> tuple[Any, dict[str, jax.Array]]:
        if stage.balance.bias_speed:
            params = move_biases(params, loads, stage.balance.bias_speed)
        return params, load_figures(loads)

    return after_update
