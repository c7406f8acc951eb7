"""Rewards of steps: which tokens they belong to, and what groups and critics make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from r1jax.data.prompts import Prompt
from r1jax.data.steps import TokenSteps
from r1jax.data.tokenizers import load_tokenizer
from r1jax.objectives.objective import NAMED, Objective, make_objective
from r1jax.rewards import Outcome, RowScore, Score
from r1jax.rollouts.sampling import Completion
from r1jax.sampler import Finish
from r1jax.settings.objective import GRPO, GSPO, PPO, DrGRPO, ReinforcePlusPlus
from r1jax.settings.optimizer import OptimizerSection
from r1jax.settings.rewards import RewardSection
from r1jax.settings.section import SettingError
from r1jax.settings.steps import StepRule
from r1jax.stages.grpo.credit import (
    check_step_rewards,
    group_advantages_of,
    scored_group,
)
from r1jax.stages.grpo.groups import (
    Group,
    Question,
    StepRewards,
    decode_group,
    encode_group,
)
from r1jax.stages.grpo.settings import GRPOStage

QUESTION = Question("questions", 0)


def completion(ids: list[int], finish: Finish = Finish.EOS, prefill: str = "") -> Completion:
    prompt = Prompt(
        id=1,
        text="?",
        prefill=prefill,
        token_ids=np.zeros(2, np.int32),
        question="?",
        answer="1",
        domain="",
    )
    log_probs = np.zeros(len(ids), np.float32)
    return Completion(prompt, 0, np.asarray(ids, np.int32), log_probs, finish, "x")


def group(lengths: list[int], rewards: list[float], steps: list[tuple[Any, Any]] | None) -> Group:
    of_steps = [
        StepRewards(np.asarray(ends, np.int32), np.asarray(values, np.float32))
        for ends, values in steps or []
    ]
    samples = [completion([5] * length) for length in lengths]
    return Group(QUESTION, samples, np.asarray(rewards, np.float32), of_steps)


def test_process_supervision_by_hand() -> None:
    """DeepSeekMath, section 4.1.3: the steps of both samples have mean 1 and std 1, and a token's
    advantage is the sum over its step and those behind it."""
    steps = [([1, 3], [0.0, 2.0]), ([0, 2], [2.0, 0.0])]
    (got,) = group_advantages_of(make_objective(GRPO()), [group([4, 3], [0, 0], steps)], 1)
    np.testing.assert_allclose(got[0], [0, 0, 1, 1], atol=1e-5)
    np.testing.assert_allclose(got[1], [0, -1, -1], atol=1e-5)
    # The reward of the sample is compared with the other samples' alone, and added.
    (got,) = group_advantages_of(make_objective(GRPO()), [group([4, 3], [3, 1], steps)], 2)
    np.testing.assert_allclose(got[0], [1, 1, 2, 2], atol=1e-5)
    np.testing.assert_allclose(got[1], [-1, -2, -2], atol=1e-5)
    centred = make_objective(DrGRPO(constant_length=4))
    steps = [([1, 3], [0.0, 4.0]), ([0, 2], [4.0, 0.0])]
    (got,) = group_advantages_of(centred, [group([4, 3], [0, 0], steps)], 1)
    np.testing.assert_allclose(got[0], [0, 0, 2, 2], atol=1e-5)
    # REINFORCE++: rewards to come, which are whitened over the phase.
    plain = make_objective(ReinforcePlusPlus())
    (got,) = group_advantages_of(plain, [group([4, 3], [1, 0], steps)], 1)
    np.testing.assert_allclose(got[0], [5, 5, 5, 5], atol=1e-5)
    np.testing.assert_allclose(got[1], [4, 0, 0], atol=1e-5)


def test_a_sample_that_is_not_scored_takes_no_part() -> None:
    steps = [([1], [2.0]), ([0], [0.0]), ([0, 1], [9.0, 9.0])]
    (got,) = group_advantages_of(make_objective(GRPO()), [group([2] * 3, [0, 0, np.nan], steps)], 1)
    for sample, expected in zip(got, (1, -1, 0), strict=True):
        np.testing.assert_allclose(sample[0], expected, atol=1e-5)


def test_without_steps_advantages_are_those_of_samples() -> None:
    groups = [group([1, 1], [1, 0], None), group([1, 1], [2, 2], None)]
    got = group_advantages_of(make_objective(GRPO()), groups, 3)
    np.testing.assert_allclose(got, [[1, -1], [0, 0]], atol=1e-5)


def test_a_critic_gets_rewards_of_tokens() -> None:
    steps = [([1, 3], [0.5, 2.0]), ([0], [1.0])]
    (got,) = group_advantages_of(make_objective(PPO()), [group([4, 3], [1, np.nan], steps)], 1)
    np.testing.assert_array_equal(got[0], [0, 0.5, 0, 3])
    np.testing.assert_array_equal(got[1], [1, 0, 0])
    (got,) = group_advantages_of(make_objective(PPO()), [group([2], [1], None)], 1)
    np.testing.assert_array_equal(got[0], [0, 1])


def test_the_score_of_a_step_is_at_the_token_that_ends_it() -> None:
    tokenizer = load_tokenizer("characters:running_total")
    tokens = TokenSteps(tokenizer, StepRule())
    ids = tokenizer("1+2=3")["input_ids"]
    rewards = {
        "right": RewardSection(weight=2.0, function="accuracy"),
        "process": RewardSection(weight=0.5, model="prm", per_step=True),
    }

    def scored(steps: tuple[tuple[int, float], ...], *of: Completion) -> Group:
        right = Score(1.0, Outcome.RIGHT)
        parts = {"right": right, "process": Score(0.4, Outcome.RIGHT, steps=steps)}
        rows = [RowScore(2.2, True, parts) for _ in of]
        return scored_group(QUESTION, of, rows, rewards, tokens)

    ended = completion([*ids, 1])
    cut = completion(ids, Finish.LENGTH)
    found = scored(((2, 0.4), (5, 0.8)), ended, cut)
    assert found.rewards.tolist() == [2, 2]  # without the solution's score
    # The last step ends with the EOS.
    assert [s.ends.tolist() for s in found.steps] == [[1, 5], [1, 4]]
    np.testing.assert_allclose(found.steps[0].rewards, [0.2, 0.4])
    # Behind a prefilled "<>" of two characters; the first step is the prompt's.
    prefilled = completion(ids, Finish.LENGTH, prefill="<>")
    (of_it,) = scored(((2, 0.4), (4, 0.6), (7, 0.8)), prefilled).steps
    assert of_it.ends.tolist() == [1, 4]
    np.testing.assert_allclose(of_it.rewards, [0.3, 0.4])
    # What has no step ends as one, wherever its text ends.
    (blank,) = scored(((1, 0.4),), completion([1])).steps
    assert (blank.ends.tolist(), blank.rewards.tolist()) == ([0], [np.float32(0.2)])
    plain = scored_group(
        QUESTION, [cut], [RowScore(2.2, True, {})], {"right": rewards["right"]}, tokens
    )
    assert plain.rewards.tolist() == [np.float32(2.2)] and not plain.steps

    again = decode_group(encode_group(found), lambda _: ended.prompt)
    for before, after in zip(found.steps, again.steps, strict=True):
        np.testing.assert_array_equal(before.ends, after.ends)
        np.testing.assert_array_equal(before.rewards, after.rewards)
    assert "steps" not in encode_group(plain)


def test_objectives_with_one_advantage_for_a_sample_are_refused_by_name() -> None:
    rewards = {"process": RewardSection(model="prm", per_step=True)}
    optimizer = OptimizerSection(learning_rate=0.1)
    stage = GRPOStage(name="rl", data="x", steps=1, optimizer=optimizer)

    def refused(objective: Objective) -> bool:
        check_step_rewards(stage, objective, {"process": RewardSection(model="prm")})
        try:
            check_step_rewards(stage, objective, rewards)
        except SettingError as error:
            return f"by its formula {objective.name} has one for each sample" in str(error)
        return False

    settings: dict[str, Any] = {"dr_grpo": DrGRPO(constant_length=4)}
    kinds = {kind: make(settings.get(kind)) for kind, make in NAMED.items()}
    assert {kind for kind, made in kinds.items() if refused(made)} == {"rloo", "gmpo", "gspo"}
    assert not refused(make_objective(GSPO(form="token")))
    assert refused(replace(kinds["grpo"], by_step=False))
    with pytest.raises(ValueError, match="per_step belongs to a process reward model"):
        RewardSection(function="accuracy", per_step=True)
