from __future__ import annotations

import pytest

from r1jax.rewards import REWARDS, Answered, Outcome, check_reward

GOOD = "<think>1+1=2</think><answer>2</answer>"


@pytest.mark.parametrize(
    ("style", "completion", "good"),
    [
        ("tags", GOOD, True),
        ("tags", "<think>\na\n\nb\n</think>\n\n<answer>\n2\n</answer>\n", True),
        ("tags", GOOD + " and more", False),
        ("tags", "Well. " + GOOD, False),
        ("tags", "<think>a</think> so <answer>2</answer>", False),
        ("tags", GOOD + "<answer>3</answer>", False),
        ("tags", "<think>a</think><answer>2<answer>3</answer></answer>", False),
        ("tags", "<think>a</think><think>b</think><answer>2</answer>", False),
        ("tags", "<think>a<think>b</think></think><answer>2</answer>", False),
        ("tags", "<think>a<answer>1</answer></think><answer>2</answer>", False),
        ("tags", "<think></think><answer>2</answer>", False),
        ("tags", "<think> \n </think><answer>2</answer>", False),
        ("tags", "<think>a</think><answer> </answer>", False),
        ("tags", "<think>a</think><answer>2", False),
        ("tags", "a</think><answer>2</answer>", False),
        ("tags", "<answer>2</answer><think>a</think>", False),
        ("tags", "", False),
        ("boxed", "<think>a</think>So it is $\\boxed{\\frac{1}{2}}$.\n", True),
        ("boxed", "<think>a</think>\\boxed{2} \\]", True),
        ("boxed", "<think>\\boxed{1}?</think>\\boxed{2}", True),
        ("boxed", "<think>a</think>\\boxed{1} \\boxed{2}", False),
        ("boxed", "<think>a</think>\\boxed{2} or so", False),
        ("boxed", "<think>a</think>\\boxed{ }", False),
        ("boxed", "<think>a</think>\\boxed{\\boxed{2}}", False),
        ("boxed", "<think>a</think>2", False),
        ("boxed", "<think></think>\\boxed{2}", False),
        ("boxed", GOOD, False),
        ("think", "<think>a</think>It is 2.", True),
        ("think", "<think>a</think> ", False),
        ("think", "<think>a</think>b<think>c</think>d", False),
        ("think", "<think>a", False),
    ],
)
def test_format(style: str, completion: str, good: bool) -> None:
    score = REWARDS["format"].function(Answered("p", completion, "2"), {"style": style})
    assert score.reward == float(good)
    assert score.outcome is (Outcome.RIGHT if good else Outcome.WRONG)


def test_default_style_is_tags_and_a_cut_off_answer_is_not_well_formed() -> None:
    function = REWARDS["format"].function
    assert function(Answered("p", GOOD, "2"), {}).reward == 1.0
    assert function(Answered("p", GOOD, "2", truncated=True), {}).reward == 0.0


def test_long_completions_match_in_linear_time() -> None:
    text = "<think>" + "<thin" * 50_000 + "</think><answer>" + "a" * 200_000
    assert REWARDS["format"].function(Answered("p", text, "2"), {}).reward == 0.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("acuracy", {}, "did you mean 'accuracy'"),
        ("format", {"style": "xml"}, "rewards.format.options.style = 'xml'.*tags"),
        ("format", {"stile": "tags"}, "rewards.format.options.stile.*style"),
        ("accuracy", {"symbolic": "no"}, "rewards.accuracy.options.symbolic = 'no'"),
        ("a.b:c d", {}, "package.module:function"),
        (":f", {}, "package.module:function"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_reward(name, options)
