"""GRPO for any model and any optax optimizer: names for its objective and its step."""

from __future__ import annotations

import optax

from r1jax.objectives.advantages import Advantages, group_advantages
from r1jax.objectives.objective import grpo_of_config
from r1jax.policy_step import GRPOBatch, LogProbFn, PolicyOutputs, make_policy_step
from r1jax.settings.objective import GRPOConfig
from r1jax.train_step import AfterUpdate, TrainState, TrainStep, init_train_state

__all__ = [
    "Advantages",
    "GRPOBatch",
    "GRPOConfig",
    "PolicyOutputs",
    "TrainState",
    "group_advantages",
    "init_train_state",
    "make_grpo_step",
]

_DEFAULT = GRPOConfig()


def make_grpo_step(
    log_prob_fn: LogProbFn,
    optimizer: optax.GradientTransformation,
    config: GRPOConfig = _DEFAULT,
    *,
    micro_batches: int = 1,
    after_update: AfterUpdate | None = None,
) -> TrainStep[GRPOBatch]:
    """`make_policy_step` with the objective of `config`:

        step = jax.jit(make_grpo_step(log_prob_fn, optax.adam(1e-6)), donate_argnums=0)

    So jitted it consumes the state, weights included: copy weights that are kept, such as those of
    the reference, before `init_train_state`. The default `kl_coefficient` of 0.001 needs
    `reference_log_probs` in each batch; with 0 there is no reference.
    """
    return make_policy_step(
        log_prob_fn,
        optimizer,
        grpo_of_config(config),
        micro_batches=micro_batches,
        after_update=after_update,
    )
