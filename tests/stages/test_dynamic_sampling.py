"""Phases that sample until there are groups enough: against plain Python, and batch by batch."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.rewards import RowScore
from r1jax.rollouts.sampling import Completion
from r1jax.rollouts.scoring import RewardScorer
from r1jax.stages.grpo import stage as grpo
from r1jax.stages.grpo.groups import Group, SampledQuestions
from r1jax.stages.grpo.phase import PhaseSampler

TESTS = Path(__file__).parents[1]
Tokens = list[list[int]]


def run(output: Path, monkeypatch: pytest.MonkeyPatch, *changes: str) -> tuple[Any, Any, Any]:
    """Metrics, and per phase the groups that were sampled and those that were trained on."""
    sampled: list[list[tuple[Tokens, list[float]]]] = []
    trained: list[list[Tokens]] = []

    def tokens(completions: Sequence[Completion]) -> Tokens:
        return [[*each.prompt.token_ids.tolist(), *each.token_ids.tolist()] for each in completions]

    def record(
        self: Any, phase: Any, of: SampledQuestions, scores: list[RowScore], facts: Any
    ) -> None:
        if not phase.facts:
            sampled.append([])
        for i in range(0, len(of.completions), 2):
            rewards = [score.reward for score in scores[i : i + 2]]
            sampled[-1].append((tokens(of.completions[i : i + 2]), rewards))
        original_record(self, phase, of, scores, facts)

    def training(stage: Any, groups: list[Group], advantages: np.ndarray) -> Any:
        trained.append([tokens(group.completions) for group in groups])
        return original_training(stage, groups, advantages)

    original_record, original_training = PhaseSampler._record, grpo.training_samples
    monkeypatch.setattr(PhaseSampler, "_record", record)
    monkeypatch.setattr(grpo, "training_samples", training)
    monkeypatch.chdir(TESTS)
    config = load_config("tiny_dynamic.yaml", [f"output={output}", *changes])
    assert recipe.run(config) == 0
    lines = (output / "tiny-dynamic-s0/stages/00-zero/metrics.jsonl").read_text().splitlines()
    monkeypatch.undo()
    return [json.loads(line) for line in lines[::2]], sampled, trained


@pytest.mark.parametrize("surplus", ["keep", "drop"])
def test_a_phase_trains_on_the_first_groups_whose_rewards_differ(
    surplus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = f"stages.zero.dynamic_sampling.surplus={surplus}"
    metrics, sampled, trained = run(tmp_path, monkeypatch, change)
    left: list[Tokens] = []
    for phase, groups, updated in zip(metrics, sampled, trained, strict=True):
        good = left + [tokens for tokens, rewards in groups if len(set(rewards)) > 1]
        assert updated == good[:4]
        assert len(groups) == phase["questions/sampled"] and len(groups) % 4 == 0
        assert len(good) >= 4 or len(groups) == 12
        without_last = left + [t for t, rewards in groups[:-4] if len(set(rewards)) > 1]
        assert len(without_last) < 4
        assert phase["groups/trained"] == len(updated) and phase["groups/from_surplus"] == len(left)
        assert phase["groups/surplus"] == len(good[4:])
        assert phase["groups/no_spread"] == len(groups) - len(good) + len(left)
        left = good[4:] if surplus == "keep" else []
    assert any(phase["groups/surplus"] for phase in metrics)


def test_a_band_leaves_out_what_is_too_easy_or_too_hard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two samples one is right, or the rewards are equal: a band without a half keeps none."""
    changes = ["stages.zero.steps=2", "stages.zero.dynamic_sampling.pass_rate=[0.6,1]"]
    (phase,), _, trained = run(tmp_path, monkeypatch, *changes)
    assert trained == [[]] and phase["groups/kept"] == phase["groups/trained"] == 0
    assert phase["groups/out_of_band"] > 0 and phase["questions/sampled"] == 12
    assert phase["optimizer/finite"] == 1 and phase["optimizer/grad_norm"] == 0


def test_what_a_phase_trains_on_is_the_same_however_far_ahead_it_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other slots other questions are sampled ahead, and those come again."""
    changes = ["stages.zero.max_new_tokens=4", "stages.zero.dynamic_sampling.questions_at_once=1"]
    runs = [
        run(tmp_path / str(slots), monkeypatch, *changes, f"stages.zero.sampling.slots={slots}")
        for slots in (2, 12)
    ]
    (metrics, sampled, trained), (others, other_sampled, other_trained) = runs
    assert trained == other_trained and sampled == other_sampled
    for one, two in zip(metrics, others, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(two[name], value, atol=1e-4, err_msg=name)
    # A phase has no question that it does not need.
    assert all(len(set(groups[-1][1])) > 1 or len(groups) == 12 for groups in sampled)
    dropped = [timings(tmp_path / str(slots), "rollout/questions_dropped") for slots in (2, 12)]
    assert any(dropped[0] + dropped[1]) and dropped[0] != dropped[1]


@pytest.mark.slow
def test_the_time_at_which_rewards_arrive_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["stages.zero.max_new_tokens=8", "stages.zero.dynamic_sampling.questions_at_once=1"]
    metrics, *groups = run(tmp_path / "soon", monkeypatch, *changes)
    in_order, calls = RewardScorer.in_order, itertools.count()

    def late(self: Any, *args: Any) -> Any:
        time.sleep(0.2 * (next(calls) % 3))
        return in_order(self, *args)

    monkeypatch.setattr(RewardScorer, "in_order", late)
    other_metrics, *others = run(tmp_path / "late", monkeypatch, *changes)
    assert metrics == other_metrics and groups == others
    for figure in ("rollout/steps", "rollout/questions_dropped"):
        assert timings(tmp_path / "soon", figure) == timings(tmp_path / "late", figure)


def timings(output: Path, name: str) -> list[float]:
    """A figure of each phase."""
    path = output / "tiny-dynamic-s0/stages/00-zero/timings.jsonl"
    return [json.loads(line).get(name, 0) for line in path.read_text().splitlines()]
