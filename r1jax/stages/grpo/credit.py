"""What samples and their tokens get of the rewards of a group: advantages, or rewards for a critic.

Where a reward model scores steps (`per_step`), the tokens of a sample differ. Of objectives that
compare groups this is process supervision as in DeepSeekMath (arXiv 2402.03300, section 4.1.3); of
those with a critic a step's score is the reward of its last token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat

import jax.numpy as jnp
import numpy as np

from r1jax.data.steps import TokenSteps
from r1jax.objectives.objective import Objective
from r1jax.rewards import RowScore
from r1jax.rollouts.sampling import Completion
from r1jax.sampler import Finish
from r1jax.settings.rewards import RewardSection
from r1jax.settings.section import SettingError
from r1jax.stages.grpo.groups import Group, Question, StepRewards
from r1jax.stages.grpo.settings import GRPOStage

_BUCKET = 32  # steps of a group: the fewer numbers, the fewer compilations


def check_step_rewards(
    stage: GRPOStage, objective: Objective, rewards: Mapping[str, RewardSection]
) -> None:
    """Raises SettingError where steps are rewarded, and the stage has no use for that."""
    names = [name for name, reward in rewards.items() if reward.per_step and reward.weight]
    if names and stage.turns is not None:
        raise SettingError(
            "turns",
            f"rewards.{names[0]}.per_step = true, and attempts are compared by their returns; "
            "remove one of the two",
        )
    if names and not objective.by_step:
        raise SettingError(
            "objective.kind",
            f"rewards.{names[0]}.per_step = true gives the tokens of a sample different "
            f"advantages, and by its formula {objective.name} has one for each sample; choose ppo, "
            "grpo, dr_grpo, dapo, cispo, sapo, reinforce_plus_plus or gspo of form token",
        )


def scored_group(
    question: Question,
    completions: Sequence[Completion],
    scores: Sequence[RowScore],
    rewards: Mapping[str, RewardSection],
    tokens: TokenSteps,
) -> Group:
    """A group with its rewards; those `per_step` are rewards of its steps, the others of samples.

    Args:
      tokens: of the policy, whose rule is not read.
    """
    steps = {n: r.weight for n, r in rewards.items() if r.per_step and r.weight}
    if not steps:
        values = [score.reward for score in scores]
        return Group(question, completions, np.asarray(values, np.float32))
    rest = {n: r.weight for n, r in rewards.items() if n not in steps and r.weight}
    values = [
        math.fsum(w * s.parts[n].reward for n, w in rest.items() if n in s.parts)
        if s.scored
        else math.nan
        for s in scores
    ]
    of_steps = [
        step_rewards(completion, score, steps, tokens)
        for completion, score in zip(completions, scores, strict=True)
    ]
    return Group(question, completions, np.asarray(values, np.float32), of_steps)


def step_rewards(
    completion: Completion, score: RowScore, weights: Mapping[str, float], tokens: TokenSteps
) -> StepRewards:
    """weight * score of each step, at the completion's token that ends it.

    A step that ends in the prompt (in its prefilled `<think>`) is left out, and the last one ends
    with the completion's last token: an EOS belongs to it.
    """
    ids = completion.token_ids.tolist()
    text_ids = ids[: len(ids) - (completion.finish == Finish.EOS)]
    text, before = tokens.decode(text_ids), len(completion.prompt.prefill)
    at: dict[int, float] = {}
    for name, weight in weights.items():
        if name not in score.parts:
            continue
        steps = [(end - before, value) for end, value in score.parts[name].steps if end > before]
        counts = tokens.counts(text_ids, [min(end, len(text)) for end, _ in steps])
        for (end, value), count in zip(steps, counts, strict=True):
            index = len(ids) - 1 if end >= len(text) else count - 1
            at[index] = at.get(index, 0.0) + weight * value
    ends = sorted(at)
    values = np.asarray([at[end] for end in ends], np.float32)
    return StepRewards(np.asarray(ends, np.int32), values)


def group_advantages_of(
    objective: Objective, groups: Sequence[Group], prompts: int
) -> list[list[float | np.ndarray]]:
    """The advantage of each sample or, where steps have rewards, of each of its tokens: float32
    [length]. Of an objective with a critic the rewards of its tokens.

    Args:
      prompts: rows to compute with, of which there are as many in every phase.
    """
    if objective.critic is not None:
        return [
            [
                token_rewards(len(completion.token_ids), float(reward), steps)
                for completion, reward, steps in zip(
                    group.completions, group.rewards, group.steps or repeat(None), strict=False
                )
            ]
            for group in groups
        ]
    assert objective.advantages is not None
    samples = max((len(group.rewards) for group in groups), default=1)
    rewards = np.full((prompts, samples), np.nan, np.float32)
    for row, group in zip(rewards, groups, strict=False):
        row[:] = group.rewards
    values = np.asarray(objective.advantages(jnp.asarray(rewards)).values)
    if not any(group.steps for group in groups):
        return [list(map(float, row)) for row, _ in zip(values, groups, strict=False)]
    given = [_scored_steps(group) for group in groups]
    width = max(sum(map(len, of_group)) for of_group in given)
    flat = np.full((prompts, -(-max(width, 1) // _BUCKET) * _BUCKET), np.nan, np.float32)
    for row, of_group in zip(flat, given, strict=False):
        joined = np.concatenate([np.zeros(0, np.float32), *of_group])
        row[: len(joined)] = joined
    of_steps = np.asarray(objective.advantages(jnp.asarray(flat)).values)
    results = []
    for group, row, sample_values, of_group in zip(groups, of_steps, values, given, strict=False):
        parts = np.split(row, np.cumsum([len(each) for each in of_group]))
        results.append(
            [
                value + sums_from(len(completion.token_ids), zip(ends, part, strict=False))
                for completion, value, (ends, _), part in zip(
                    group.completions, sample_values, group.steps, parts, strict=False
                )
            ]
        )
    return results


def _scored_steps(group: Group) -> list[np.ndarray]:
    """The rewards of each sample's steps; NaN where the sample is not scored."""
    return [
        np.where(np.isnan(reward), np.nan, steps.rewards).astype(np.float32)
        for reward, steps in zip(group.rewards, group.steps, strict=True)
    ]


def token_rewards(length: int, reward: float, steps: StepRewards | None) -> np.ndarray:
    """Rewards of tokens, float32 [length]: a sample's at its last one (NaN counts as 0, as such a
    sample is not trained on), and those of steps at theirs."""
    rewards = np.zeros(length, np.float32)
    rewards[-1:] = 0.0 if math.isnan(reward) else reward
    if steps is not None:
        rewards[steps.ends] += steps.rewards
    return rewards


def sums_from(length: int, steps: Iterable[tuple[int, float]]) -> np.ndarray:
    """At each token the sum over the steps that end there or later, float32 [length] (DeepSeekMath,
    section 4.1.3)."""
    sums = np.zeros(length, np.float32)
    for end, value in steps:
        sums[: end + 1] += value
    return sums
