"""GRPO as a page of pure functions; nothing here knows r1jax's models, data or configs."""

from r1jax.grpo.advantages import Advantages, group_advantages
from r1jax.grpo.losses import (
    GRPOConfig,
    TokenTerms,
    k3_divergence,
    token_terms,
    token_weights,
)
from r1jax.grpo.step import (
    GRPOBatch,
    TrainState,
    accumulate_gradients,
    apply_if_finite,
    init_train_state,
    make_grpo_step,
    map_micro_batches,
)

__all__ = [
    "Advantages",
    "GRPOBatch",
    "GRPOConfig",
    "TokenTerms",
    "TrainState",
    "accumulate_gradients",
    "apply_if_finite",
    "group_advantages",
    "init_train_state",
    "k3_divergence",
    "make_grpo_step",
    "map_micro_batches",
    "token_terms",
    "token_weights",
]
