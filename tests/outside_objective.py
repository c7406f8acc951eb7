"""Objectives from outside: a value, functions that return one, and some that a stage cannot use."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from r1jax.objectives.objective import Objective, PolicyTokens, Ratio, grpo, ppo
from r1jax.objectives.policy_loss import Surrogate
from r1jax.settings.objective import GRPO


def unclipped(kl: float = 0.0) -> Objective:
    def surrogate(ratio: Ratio, tokens: PolicyTokens) -> Surrogate:
        value = ratio.values * tokens.advantages
        return Surrogate(value, jnp.zeros(value.shape, bool))

    return replace(grpo(GRPO(kl_coefficient=kl)), name="unclipped", surrogate=surrogate)


VALUE = unclipped()
NEEDS_VALUES = replace(VALUE, needs=("values",))
UNCORRECTED = replace(VALUE, correction=None)
CRITIC = replace(ppo(), critic=None)
NOTHING = 3


def fails() -> Objective:
    raise ValueError("no such thing")
