from __future__ import annotations

import pytest

from r1jax.rewards import REWARDS, Outcome, RewardInput, check_reward
from r1jax.rewards.extraction import final_answer
from r1jax.rewards.format import well_formed
from r1jax.rewards.visible import is_blank

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
    score = REWARDS["format"].function(RewardInput("p", completion, "2"), {"style": style})
    assert score.reward == float(good)
    assert score.outcome is (Outcome.RIGHT if good else Outcome.WRONG)


INVISIBLE = [
    "\u200b", "\ufeff", "\u3164", "\u2800", "\0", "\u202e", "\u115f", "\u1160", "\uffa0", "\u0301",
    "\u2028", "\u3000", "\ufe0f", "\ue000", "{}", "\\text{}", "\\;", "\\phantom{5}", "\\quad",
    "\\hspace{1cm}", "$ $", "\\mathrm{\\text{ }}", "\\left.\\right.", "\u200b \u0301\\,",
]  # fmt: skip


@pytest.mark.parametrize("nothing", INVISIBLE)
def test_what_shows_nothing_is_empty(nothing: str) -> None:
    assert is_blank(nothing)
    for style, completion in (
        ("tags", f"<think>{nothing}</think><answer>2</answer>"),
        ("tags", f"<think>a</think><answer>{nothing}</answer>"),
        ("boxed", f"<think>a</think>\\boxed{{{nothing}}}"),
        ("boxed", f"<think>{nothing}</think>\\boxed{{2}}"),
        ("think", f"<think>{nothing}</think>2"),
        ("think", f"<think>a</think>{nothing}"),
    ):
        assert not well_formed(completion, style)
    assert final_answer(f"<think>a</think>\\boxed{{{nothing}}}") is None


@pytest.mark.parametrize(
    "something", ["5", "-", "\\pi", "a\u0301", "。", "\\text{a}", "\\%", "∅", "ㅤx"]
)
def test_what_shows_something_is_not_empty(something: str) -> None:
    assert not is_blank(something)
    assert well_formed(f"<think>{something}</think>\\boxed{{{something}}}", "boxed")


@pytest.mark.parametrize("stop", "。．।॥؟۔።။។…!?.*")
def test_a_box_may_be_followed_by_a_full_stop_of_any_script(stop: str) -> None:
    assert well_formed(f"<think>计算</think> 答案是 $\\boxed{{1}}${stop}\n", "boxed")
    assert not well_formed(f"<think>计算</think> 答案是 $\\boxed{{1}}${stop} 2", "boxed")


@pytest.mark.parametrize(
    "more", ["%", "′", ",", "、", "：", "/2", "#", "°", "\\", "5", "¿", "‰", "(a)"]
)
def test_a_box_may_not_be_followed_by_more_of_the_answer(more: str) -> None:
    assert not well_formed(f"<think>a</think>\\boxed{{1}}{more}", "boxed")


def test_default_style_is_tags_and_a_cut_off_answer_is_not_well_formed() -> None:
    function = REWARDS["format"].function
    assert function(RewardInput("p", GOOD, "2"), {}).reward == 1.0
    assert function(RewardInput("p", GOOD, "2", truncated=True), {}).reward == 0.0


def test_long_completions_match_in_linear_time() -> None:
    text = "<think>" + "<thin" * 50_000 + "</think><answer>" + "a" * 200_000
    assert REWARDS["format"].function(RewardInput("p", text, "2"), {}).reward == 0.0


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
