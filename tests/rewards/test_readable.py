"""The readability reward says what the filters of the training texts say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.rewards import REWARDS, Outcome, RewardInput, Score, Verifier, check_reward
from r1jax.rewards.extraction import final_answer
from r1jax.rewards.filters import apply_filters, load_filters
from r1jax.settings.rewards import RewardSection, VerifierSection

OPTIONS: dict[str, Any] = {
    "format": {"style": "think"},
    "language_mixing": {"target": "en"},
    "repetition": {},
}
GOOD = "<think>I add three and four.</think>It is \\boxed{7}."
MIXED = "<think>I add 三和四 to it.</think>It is \\boxed{7}."
LOOP = f"<think>I add.</think>{'It is so. ' * 30}\\boxed{{7}}"


def readable(completion: str, options: dict[str, Any], *, truncated: bool = False) -> Score:
    row = RewardInput("p", completion, "the reference does not count", truncated=truncated)
    return REWARDS["readable"].function(row, options)


@pytest.mark.parametrize(
    ("completion", "refused"),
    [
        (GOOD, None),
        ("It is \\boxed{7}.", "filter format"),
        (MIXED, "filter language_mixing"),
        (LOOP, "filter repetition"),
        (MIXED + "</think>", "filter format"),  # the first one that refuses
        ("", "filter format"),
    ],
)
def test_readable(completion: str, refused: str | None) -> None:
    score = readable(completion, OPTIONS)
    right = refused is None
    assert (score.reward, score.detail) == (float(right), refused)
    assert score.outcome is (Outcome.RIGHT if right else Outcome.WRONG)
    assert score.extracted == final_answer(completion)


def test_a_completion_that_was_cut_off_is_not_readable() -> None:
    score = readable(GOOD, OPTIONS, truncated=True)
    assert (score.reward, score.outcome, score.detail) == (0.0, Outcome.WRONG, "truncated")


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "so ", "三", "\n\n", "```", "<answer>"])),
    st.permutations(["format", "code_blocks", "length", "language_mixing"]).flatmap(
        lambda names: st.integers(1, len(names)).map(lambda count: names[:count])
    ),
)
def test_it_is_readable_if_all_filters_keep_it(parts: list[str], names: list[str]) -> None:
    settings: dict[str, Any] = {"length": {"max_words": 4}, "language_mixing": {"target": "zh"}}
    options = {name: settings.get(name, {}) for name in names}
    text = "".join(parts)
    refused = apply_filters(text, load_filters(options))
    score = readable(text, options)
    assert score.reward == float(refused is None)
    assert score.detail == (refused and f"filter {refused}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"rewards\.readable\.options is empty: name at least one filter of \['code_blocks',"),
        ({"formt": {}}, r"^rewards\.readable\.options\.formt: no filter .*did you mean 'format'"),
        ({"format": None}, r"^rewards\.readable\.options\.format = None: must map .*\{\} takes"),
        ({"format": "think"}, r"^rewards\.readable\.options\.format = 'think': must map"),
        ({"format": {"style": "xml"}}, r"^rewards\.readable\.options\.format\.style = 'xml': "),
        ({"language_mixing": {}}, r"^rewards\.readable\.options\.language_mixing\.target is miss"),
        ({"format": {}, "length": {"n": 1}}, r"^rewards\.readable\.options\.length\.n: no such"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward("readable", options)


def test_good_options() -> None:
    check_reward("readable", OPTIONS)


def test_rows_are_scored_in_a_worker_process() -> None:
    rewards = {"style": RewardSection(function="readable", options=OPTIONS)}
    with Verifier(rewards, VerifierSection()) as verifier:
        rows = [RewardInput("p", text, "7") for text in (GOOD, MIXED)]
        scores = verifier.submit(rows).result()
    assert [score.reward for score in scores] == [1.0, 0.0]
    assert scores[1].parts["style"].detail == "filter language_mixing"


def test_the_rewards_import_no_data_and_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from r1jax.rewards import check_reward\n"
        "check_reward('readable', {'repetition': {}, 'length': {}})\n"
        "heavy = {'jax', 'numpy', 'pydantic', 'scipy', 'sympy', 'math_verify', 'transformers'}\n"
        "print(heavy & set(sys.modules), 'r1jax.data' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set() False\n"
