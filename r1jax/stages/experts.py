"""Which settings about experts a model has a use for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1jax.settings.optimizer import BalanceSection
from r1jax.settings.section import SettingError

if TYPE_CHECKING:
    from r1jax.models.config import ModelConfig


def check_experts(
    balance: BalanceSection, config: ModelConfig, *, replay_experts: bool = False
) -> None:
    """Raises SettingError for a setting of a stage that the model has no use for."""
    settings = {
        "balance.bias_speed": balance.bias_speed,
        "balance.sequence_loss": balance.sequence_loss,
        "replay_experts": replay_experts,
    }
    for key, value in settings.items():
        if value and config.experts is None:
            raise SettingError(
                key, f"the model ({config.architecture}) has no experts; leave it out"
            )
    if balance.bias_speed and config.experts is not None and not config.experts.biased:
        raise SettingError(
            "balance.bias_speed",
            f"with topk_method = {config.experts.topk_method!r} the model has no biases; use "
            "balance.sequence_loss",
        )
