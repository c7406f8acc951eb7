"""Which questions a phase samples and which groups it trains on, against plain Python."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from r1jax.config.load import ConfigError, load_config
from r1jax.data.prompts import Prompt
from r1jax.rollouts.sampling import Completion
from r1jax.run.resolve import check, resolve
from r1jax.sampler import Finish
from r1jax.settings.optimizer import OptimizerSection
from r1jax.stages.grpo.groups import Group, Question, decode_group, encode_group
from r1jax.stages.grpo.selection import (
    Choice,
    Fate,
    GroupResult,
    draw_questions,
    group_fate,
    note_settled,
    questions_ahead,
    questions_to_sample,
    shares,
)
from r1jax.stages.grpo.settings import DynamicSampling, GRPOStage

TINY = Path(__file__).parents[1] / "tiny.yaml"


def stage(dynamic: dict[str, Any] | None, **changes: Any) -> GRPOStage:
    settings = {"data": "x", "steps": 2, "questions_per_step": 2, "mini_batches_per_rollout": 2}
    settings |= {"outputs_per_question": 4, "checkpoint_every": 2} | changes
    section = None if dynamic is None else DynamicSampling.model_validate(dynamic)
    optimizer = OptimizerSection(learning_rate=1e-2)
    return GRPOStage(name="rl", optimizer=optimizer, dynamic_sampling=section, **settings)


def result(*rewards: float, right: int = 0) -> GroupResult:
    return GroupResult(rewards, right)


def test_a_phase_by_hand() -> None:
    """Four groups wanted, three questions at a time, at most nine; one group is left over."""
    rl = stage({"questions_at_once": 3, "max_questions": 9, "pass_rate": [0.25, 0.75]})
    assert rl.dynamic_sampling is not None
    choice = Choice(from_surplus=1)
    assert questions_to_sample(rl, choice, 0) == 3
    choice.add([result(1, 1), result(1, 0, right=1), result(2, 3, right=2)], rl.dynamic_sampling)
    assert choice.fates == [Fate.NO_SPREAD, Fate.KEPT, Fate.OUT_OF_BAND] and choice.kept == [0, 2]
    assert questions_to_sample(rl, choice, 3) == 3
    choice.add([result(0, 1, 1, 0, right=2)] * 3, rl.dynamic_sampling)
    assert questions_to_sample(rl, choice, 6) == 0  # enough
    assert choice.trained(rl) == [0, 2, 4, 5] and choice.surplus(rl) == [6]
    assert questions_to_sample(rl, Choice(3), 9) == 0  # at the limit
    # Without dynamic sampling all groups are trained on, the phase's questions at once.
    plain, everything = stage(None), Choice(0)
    assert [questions_to_sample(plain, everything, n) for n in (0, 4)] == [4, 0]
    # Where samples go on, the phase behind needs questions, too, unless enough groups were left.
    partial = stage(None, tokens_per_phase=4, max_new_tokens=8, sampling={"slots": 4})
    went_on = Choice(1)
    went_on.add([result(1, 1)] * 4, None)
    assert [questions_to_sample(partial, went_on, n) for n in (0, 4)] == [4, 0]
    assert questions_to_sample(partial, Choice(4), 0) == 0
    everything.add([result(1, 1)] * 4, None)
    assert everything.trained(plain) == [0, 1, 2, 3]


def test_a_group_is_kept_where_its_rewards_differ_and_its_pass_rate_is_in_the_band() -> None:
    band = DynamicSampling(pass_rate=(0.25, 0.5))
    fates = [group_fate(result(0, 1, 0, 1, right=n), band) for n in range(5)]
    assert fates == [Fate.OUT_OF_BAND, Fate.KEPT, Fate.KEPT, Fate.OUT_OF_BAND, Fate.OUT_OF_BAND]
    for nothing in ((), (1.0,), (0.5, 0.5), (0.1, 0.1 + 1e-12)):  # equal in float32
        assert group_fate(GroupResult(nothing, 0), None) is Fate.NO_SPREAD
    assert group_fate(result(0.1, 0.1 + 1e-6), None) is Fate.KEPT


@pytest.mark.parametrize("seed", range(30))
def test_phases_are_those_of_plain_python(seed: int) -> None:
    """Random rewards of a stream of questions, phase after phase, with surplus and skipping."""
    rng = random.Random(seed)
    at_once = rng.choice([1, 2, 4])
    keep, again = rng.random() < 0.5, rng.choice([None, 1, 3, 8])
    band = rng.choice([(0.0, 1.0), (0.25, 0.75), (0.5, 1.0)])
    rl = stage(
        {
            "questions_at_once": at_once,
            "max_questions": 4 * rng.choice([1, 2, 3]),
            "surplus": "keep" if keep else "drop",
            "pass_rate": band,
            "look_again_after": again,
        }
    )
    rewards = {
        (q, phase, nth): [rng.choice([0.0, 1.0]) if rng.random() < 0.4 else 1.0 for _ in range(4)]
        for q, phase, nth in itertools.product(range(7), range(6), range(20))
    }

    def group(q: int, phase: int, nth: int) -> GroupResult:
        of_group = rewards[q, phase, nth]
        return result(*of_group, right=int(sum(of_group)))

    def by_the_module() -> list[tuple[list[Any], int]]:
        stream, skip_until, left, phases = itertools.cycle(range(7)), {}, [], []
        for phase in range(6):
            choice, groups, passed = Choice(len(left)), list(left), set()
            sampled = 0
            while count := questions_to_sample(rl, choice, sampled):
                drawn = draw_questions(lambda: next(stream), count, skip_until, phase, passed)
                found = [(q, phase, sampled + i) for i, q in enumerate(drawn.questions)]
                results = [group(*each) for each in found]
                choice.add(results, rl.dynamic_sampling)
                if again:
                    note_settled(skip_until, drawn.questions, results, phase, again)
                groups += found
                sampled += count
            left = [groups[n] for n in choice.surplus(rl)] if keep else []
            phases.append(([groups[n] for n in choice.trained(rl)], sampled))
        return phases

    def by_hand() -> list[tuple[list[Any], int]]:
        position, off, left, phases = 0, {}, [], []
        for phase in range(6):
            good, sampled, skipped = list(left), 0, set()
            while len(good) < 4 and sampled + at_once <= rl.max_questions:
                batch = []
                while len(batch) < at_once:
                    q, position = position % 7, position + 1
                    if off.get(q, -1) > phase and q not in skipped:
                        skipped.add(q)
                        continue
                    batch.append(q)
                for i, q in enumerate(batch):
                    of_group = rewards[q, phase, sampled + i]
                    right = sum(of_group)
                    if again is not None:
                        off[q] = phase + again if right in (0, 4) else -1
                    if 0 < right < 4 and band[0] * 4 <= right <= band[1] * 4:
                        good.append((q, phase, sampled + i))
                sampled += at_once
            phases.append((good[:4], sampled))
            left = good[4:] if keep else []
        return phases

    assert by_the_module() == by_hand()


def test_questions_are_sampled_ahead_as_far_as_groups_may_be_missing() -> None:
    assert questions_ahead(8, 0, 0, 0) == 8  # nothing is known: all may be kept
    assert questions_ahead(8, 0, 0, 8) == 0
    assert questions_ahead(8, 8, 20, 0) == questions_ahead(8, 5, 5, 3) == 0
    # One of four is kept, and one counts beside the results: 2 / 5. Of five under way two are
    # likely, and one fewer by the deviation, sqrt(5 * 0.4 * 0.6) = 1.1: six groups are missing.
    assert questions_ahead(8, 1, 4, 5) == math.ceil((8 - 1 - 2 + math.sqrt(1.2)) / 0.4)
    wanted = [questions_ahead(512, kept, 512, 100) for kept in (512, 400, 256, 0)]
    assert wanted[0] == 0 and wanted == sorted(wanted)
    # The more is under way, the less is added; and never so much that nothing were left to learn.
    added = [questions_ahead(512, 200, 400, open_) for open_ in (0, 100, 500, 800)]
    assert added == sorted(added, reverse=True) and added[-1] == 0 < added[2]


def test_settled_questions_are_skipped_until_it_is_time_to_look_again() -> None:
    skip_until = {"b": 9, "c": 1}
    results = [result(1, 1, right=2), result(0, 0), result(0, 1, right=1), result()]
    note_settled(skip_until, ["a", "x", "b", "y"], results, step=4, look_again_after=3)
    assert skip_until == {"a": 7, "x": 7, "c": 1}  # y was not scored: nobody knows
    stream, passed = itertools.cycle("axz"), set[str]()
    first = draw_questions(lambda: next(stream), 2, skip_until, 6, passed)
    # A second time in the phase they are taken: there is nothing else.
    assert (first.questions, first.skipped, passed) == (["z", "a"], 2, {"a", "x"})
    assert draw_questions(lambda: next(stream), 2, skip_until, 6, passed).questions == ["x", "z"]
    assert draw_questions(lambda: next(stream), 2, skip_until, 7, set()).questions == ["a", "x"]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_groups_are_dealt_evenly_and_in_order(count: int) -> None:
    for length in range(17):
        dealt = shares(list(range(length)), count)
        assert list(itertools.chain(*dealt)) == list(range(length))
        sizes = [len(each) for each in dealt]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= -(-length // count)


def test_groups_survive_the_checkpoint_to_the_bit() -> None:
    prompt = Prompt(7, "?", "", np.asarray([3, 4], np.int32), "?", "1")
    rng = np.random.default_rng(0)
    completions = [
        Completion(
            prompt,
            n,
            rng.integers(0, 20, length).astype(np.int32),
            -rng.random(length).astype(np.float32),
            Finish.STOP,
            "",
            drafted=n,
            experts=rng.integers(0, 9, (2 + length, 3)).astype(np.uint8),
        )
        for n, length in enumerate((3, 1, 5))
    ]
    group = Group(Question("x", 5), completions, np.asarray([0.1, np.nan, 1], np.float32))
    again = decode_group(json.loads(json.dumps(encode_group(group))), lambda question: prompt)
    assert again.question == group.question and again.rewards.dtype == np.float32
    np.testing.assert_array_equal(again.rewards, group.rewards)
    for a, b in zip(again.completions, completions, strict=True):
        assert (a.sample, a.finish, a.drafted, a.prompt) == (b.sample, b.finish, b.drafted, prompt)
        for name in ("token_ids", "sampler_log_probs", "experts"):
            left, right = getattr(a, name), getattr(b, name)
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("dynamic", "changes", "message"),
    [
        ({"pass_rate": [0.5, 0.5]}, {}, r"dynamic_sampling\.pass_rate.*0 <= low < high <= 1"),
        ({"pass_rate": [0.8, 0.2]}, {}, r"dynamic_sampling\.pass_rate.*0 <= low < high <= 1"),
        ({"pass_rate": [0.3, 0.4]}, {}, r"\[0.3, 0.4\]: no group of outputs_per_question = 4"),
        ({"max_questions": 3}, {}, r"max_questions = 3 is less than .* = 4, the questions of a"),
        ({"max_questions": 6, "questions_at_once": 4}, {}, r"= 6 is not a multiple of .* = 4"),
        ({"questions_at_once": 8}, {}, r"questions_at_once = 8 is more than .* = 4"),
        ({"max_questions": 0}, {}, r"dynamic_sampling\.max_questions"),
        ({"look_again_after": 0}, {}, r"dynamic_sampling\.look_again_after"),
        ({"surplus": "sell"}, {}, r"dynamic_sampling\.surplus.*: should be drop or keep"),
        ({"surplus": "keep"}, {"loss": {"importance_cap": None}}, "surplus = 'keep' with loss.imp"),
        ({}, {"outputs_per_question": 1}, "outputs_per_question"),
        ({}, {"rewards": ["nothing"]}, r"the weights of its rewards, nothing, are all 0"),
    ],
)
def test_what_cannot_work_is_refused_before_any_compute(
    dynamic: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plan = yaml.safe_load(TINY.read_text())
    plan["rewards"]["nothing"] = {"function": "tiny_rewards:digits", "weight": 0}
    zero = {**plan["stages"][2], "held_out": None, "dynamic_sampling": dynamic, **changes}
    plan |= {"output": str(tmp_path), "stages": [zero]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ConfigError, match=rf"config\.yaml:\d+: .*{message}"):
        check(resolve(load_config(tmp_path / "config.yaml")))
