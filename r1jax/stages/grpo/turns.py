"""Reinforcement learning on several attempts at a question (SCoRe, Kumar et al. 2024, arXiv
2409.12917): the returns of each attempt, and its advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from r1jax.objectives.objective import AdvantageFn, Objective
from r1jax.rollouts.turns import check_turns
from r1jax.run.resolve import ResolvedRun
from r1jax.sampler import Finish
from r1jax.settings.section import SettingError
from r1jax.settings.turns import TrainedTurn
from r1jax.stages.grpo.groups import Group
from r1jax.stages.grpo.objective import stage_objective
from r1jax.stages.grpo.rows import TrainingSample
from r1jax.stages.grpo.settings import GRPOStage


def check_stage_turns(stage: GRPOStage, run: ResolvedRun) -> None:
    """Raises ConfigError where the stage's turns fit neither its data, model nor objective."""
    if stage.turns is None:
        return
    check_turns(stage, stage.turns, stage.longest_limit, run)
    with run.config.blaming("stages", stage.name):
        objective = stage_objective(stage)
        if objective.advantages is None:
            raise SettingError(
                "turns",
                f"objective {objective.name} has advantages of tokens, and attempts are compared "
                "by their returns; choose a kind that compares samples, such as grpo or rloo",
            )
        if objective.penalty is None and any(each.kl_coefficient for each in stage.turns):
            raise SettingError(
                "turns",
                f"kl_coefficient of a turn, and objective {objective.name} has no penalty; give it "
                "one",
            )


def turn_returns(turns: Sequence[TrainedTurn], rewards: np.ndarray) -> np.ndarray:
    """Returns of attempts [..., attempts], of their rewards; nan where a reward is missing.

    Of attempt k: weight r_k + improvement (r_k - r_(k-1)) + discount return_(k+1). With weight 0
    on the first attempt this is stage I of SCoRe (equation 3), with improvement alpha on the second
    one stage II (equation 4, and its bonus). What a coefficient of 0 stands before may be missing.
    """
    attempts = [turn for turn in turns if turn.role == "assistant"]
    returns = np.zeros(rewards.shape, np.float32)
    for k in reversed(range(len(attempts))):
        turn, reward = attempts[k], rewards[..., k]
        if turn.weight:
            returns[..., k] += turn.weight * reward
        if turn.improvement:
            returns[..., k] += turn.improvement * (reward - rewards[..., k - 1])
        if turn.discount and k + 1 < len(attempts):
            returns[..., k] += turn.discount * returns[..., k + 1]
    return returns


def turn_samples(
    stage: GRPOStage, groups: Sequence[Group], objective: Objective, questions: int
) -> list[TrainingSample]:
    """The samples of groups with the advantages of each attempt: its return among those of the
    same attempt in the group.

    An attempt without a return, a truncated one if the stage says so, and one that is not
    `trained` are left out of the loss.

    Args:
      questions: of all groups, some of which may be missing: one shape is compiled.
    """
    assert stage.turns is not None and objective.advantages is not None
    shape = (questions, stage.outputs_per_question, stage.attempts)
    rewards = np.full(shape, np.nan, np.float32)
    for of_group, group in zip(rewards, groups, strict=False):
        for row, last, reward in zip(of_group, group.completions, group.rewards, strict=True):
            row[:] = [*(score.reward for _, score in last.earlier), reward]
    returns = turn_returns(stage.turns, rewards)
    values = _advantages(objective.advantages, returns)
    default = objective.penalty.coefficient if objective.penalty is not None else 0.0
    attempts = [turn for turn in stage.turns if turn.role == "assistant"]
    samples = []
    for g, group in enumerate(groups):
        for n, last in enumerate(group.completions):
            sequences = [
                TrainingSample(
                    completion,
                    float(values[g, n, k]),
                    turn.trained
                    and not np.isnan(returns[g, n, k])
                    and not (stage.mask_truncated and completion.finish == Finish.LENGTH),
                    default if turn.kl_coefficient is None else turn.kl_coefficient,
                )
                for k, (turn, completion) in enumerate(
                    zip(attempts, (*(each for each, _ in last.earlier), last), strict=True)
                )
            ]
            samples.append(replace(sequences[-1], earlier=tuple(sequences[:-1])))
    return samples


def _advantages(advantages: AdvantageFn, returns: np.ndarray) -> np.ndarray:
    values = [
        np.asarray(advantages(jnp.asarray(returns[..., k])).values)
        for k in range(returns.shape[-1])
    ]
    return np.stack(values, axis=-1)
