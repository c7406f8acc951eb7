"""The balance of experts as a part of a stage's update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from r1jax.models import ModelConfig
from r1jax.models.balance import Loads, load_figures, move_biases
from r1jax.models.decoder import Routings
from r1jax.settings.optimizer import BalanceSection
from r1jax.train_step import AfterUpdate, Metrics

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree


def check_experts(
    stage_name: str, balance: BalanceSection, config: ModelConfig, *, replay_experts: bool = False
) -> None:
    """Raises ValueError for a setting about experts that the model has no use for."""
    where = f"stages.{stage_name}"
    settings = {
        "balance.bias_speed": balance.bias_speed,
        "balance.sequence_loss": balance.sequence_loss,
        "replay_experts": replay_experts,
    }
    for key, value in settings.items():
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


def imbalance_of(routings: Routings) -> Float[Array, " rows"]:
    """Of each row, summed over its sequences and the layers."""
    return jnp.sum(jnp.concatenate([each.imbalance for each in routings.values()]), axis=0)


def make_after_update(balance: BalanceSection, config: ModelConfig) -> AfterUpdate | None:
    """What follows the optimizer: the biases move, and the experts' loads become metrics.

    None for a dense model. The counts that the update is given are those of `loads_of`.
    """
    if config.experts is None:
        return None

    def after_update(params: PyTree, loads: Loads) -> tuple[PyTree, Metrics]:
        if balance.bias_speed:
            params = move_biases(params, loads, balance.bias_speed)
        return params, load_figures(loads)

    return after_update
