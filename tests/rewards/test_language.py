"""Which words are in which language; sentences counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.rewards import (
    REWARDS,
    Outcome,
    RewardInput,
    Score,
    check_reward,
    language_share,
    words_by_language,
)
from r1jax.rewards.extraction import after_thinking, thought
from r1jax.rewards.words import words

TOY = {"low": "abc012", "high": "ABC345"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don't 3rd x² café", [("Latin", "dont"), ("Number", "3"), ("Latin", "rd"), ("Latin", "x")]
         + [("Number", "²"), ("Latin", "café")]),
        ("用Python写", [("Han", "用"), ("Latin", "Python"), ("Han", "写")]),
        # The accent as a character of its own, and a vowel sign: neither parts its word.
        ("cafe\u0301s", [("Latin", "cafes")]),
        ("\u0915\u093f\u0924\u093e\u092c", [("Devanagari", "\u0915\u0924\u092c")]),
        ("ﬁnd Ｌｏｗ", [("Latin", "ﬁnd"), ("Latin", "Ｌｏｗ")]),
        ("コーヒーを", [("Katakana", c) for c in "コーヒー"] + [("Hiragana", "を")]),
        ("API를 쓴다", [("Latin", "API"), ("Hangul", "를"), ("Hangul", "쓴다")]),
        ("人々", [("Han", "人"), ("Han", "々")]),
        ("привет_мир", [("Cyrillic", "привет"), ("Cyrillic", "мир")]),
        # Signs that are letters to Unicode, and no letters at all.
        ("ℝ 𝐱 ℓ \ud800 \ue000 。！", []),
        ("", []),
    ],
)  # fmt: skip
def test_words(text: str, expected: list[tuple[str, str]]) -> None:
    assert list(words(text)) == expected


ENGLISH = "First, let's compute the total: there are 12 eggs and she sells 7 of them."  # 13 words
CHINESE = "首先，我们计算总数：一共有12个鸡蛋，她卖了7个。"  # 2+6+3+3+3+1 = 18


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (ENGLISH, {"Latin": 13}),
        (CHINESE, {"Han": 18}),
        ("我们需要先 check 一下 the answer。", {"Han": 7, "Latin": 3}),
        ("Так, сначала считаем сумму.", {"Cyrillic": 4}),
        # Formulae: all five kinds of delimiters, and commands outside of them.
        ("The area is $A = \\pi r^2 \\text{ square}$ so", {"Latin": 4}),
        ("so $$\nsum of all\n$$ and \\(some thing\\) or \\[any thing\\] here", {"Latin": 4}),
        ("\\[ a \\\\[2pt] words inside \\] outside", {"Latin": 1}),
        ("\\begin{align*} total &= price \\end{align*} done", {"Latin": 1}),
        ("\\begin{itemize}\n\\item first step\n\\end{itemize}", {"Latin": 2}),
        ("so \\frac{a}{b} \\times \\textbf{nine} is", {"Latin": 3}),
        # Prices are no formulae: neither a space before the closing dollar, nor a digit after it.
        ("It costs $5 and then $7 more", {"Latin": 5}),
        ("pay $5 or-$8 now", {"Latin": 3}),
        ("\\$5 for tea and \\$6 for milk", {"Latin": 5}),
        ("\\$five-$x$ more", {"Latin": 2}),
        ("a $5 note for $x$ days", {"Latin": 3}),
        # Code.
        ("Run `pip install this` now", {"Latin": 2}),
        ("Code:\n```python\nfor word in words:\n    print(word)\n```\nworks", {"Latin": 2}),
        ("Code: ```open here", {"Latin": 1}),
        ("Code: ```open to the end", {"Latin": 5}),  # four words beside each other are prose
        # Other scripts always count in code and formulae, Latin and Greek in prose alone.
        ("so $x = 总数$", {"Latin": 1, "Han": 2}),
        ("`我们` \\(ещё\\) $$も$$", {"Han": 2, "Cyrillic": 1, "Hiragana": 1}),
        ("好 $\\text{the whole thought is here}$", {"Han": 1, "Latin": 5}),
        ("好 `the sum of it = all of them` 好", {"Han": 2, "Latin": 7}),
        ("```py\n# add all of the numbers\nx = y\n```", {"Latin": 5}),
        ("```py\nfrom numpy import array as arr\nreturn total\n```", {}),
        ("```\npublic static void main(String[] args) {\n  int x = 3;\n}", {}),
        ("```\n总数 = 3\nprint(总数)", {"Han": 4}),
        ("$\\alpha\\beta = αβ$", {}),
        ("好 `First, we add; then, we multiply`", {"Han": 1, "Latin": 6}),
        (
            "好 $First\\ we\\ add\\ all$ $\\text{First}\\text{ we}\\text{ add}\\text{ all}$",
            {"Han": 1, "Latin": 8},
        ),
        (
            "$\\text{speed} = \\frac{\\text{way}}{\\text{time}} \\cdot [red, green, blue, white]$",
            {},
        ),
        ("````\n```\nnested\n```\n```` out", {"Latin": 1}),
        ("one ` alone", {"Latin": 2}),
        # Variables and labels are no words, but one Chinese character is.
        ("设 x 为 θ，点 A 在", {"Han": 4}),
        ("I have a dog", {"Latin": 2}),
        ("<think>so</think><answer>yes</answer>", {"Latin": 2}),
        ("1 + 1 = 2 ...", {}),
    ],
)
def test_words_by_language(text: str, counts: dict[str, int]) -> None:
    assert dict(words_by_language(text)) == counts


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        (ENGLISH, "en", 1.0),
        (ENGLISH, "zh", 0.0),
        (ENGLISH + CHINESE, "en", 13 / 31),
        (ENGLISH + CHINESE, "zh", 18 / 31),
        ("これは本です", "ja", 1.0),
        ("これは本です", "zh", 1 / 6),
        ("$1+1$", "en", None),
        ("", "zh", None),
    ],
)
def test_language_share(text: str, target: str, share: float | None) -> None:
    assert language_share(text, target) == (None if share is None else pytest.approx(share))


def test_toy_languages_are_told_by_their_characters() -> None:
    # Words: ab, 1 | BC | q no word as a lone letter, qr Latin | 9 no word | aA is two words.
    assert words_by_language("ab+1=BC q qr 9 aA", TOY) == {"low": 3, "high": 2, "Latin": 1}
    assert language_share("ab+1=BC q qr 9 aA", "low", TOY) == 0.5
    assert language_share("a 0", "low", TOY) == 1.0  # lone letters and digits are words there
    assert language_share("a 0", "high", TOY) == 0.0
    # A name of one's own goes before the built-in one.
    assert language_share("ab ab AB cd", "en", {"en": "ab", "zh": "AB"}) == 0.5


@given(st.lists(st.sampled_from(["word", "用", "12", "$x+y$", "`code`", "мир", "A", "?"])))
def test_shares_of_disjoint_languages_add_up_to_one(parts: list[str]) -> None:
    text = " ".join(parts)
    shares = [language_share(text, target) for target in ("en", "zh", "ru")]
    counted = [sum(part == word for part in parts) for word in ("word", "用", "мир")]
    if not sum(counted):
        assert shares == [None] * 3
    else:
        assert shares == [pytest.approx(count / sum(counted)) for count in counted]


@given(st.text(), st.text())
def test_words_of_a_text_are_those_of_its_lines(first: str, second: str) -> None:
    assert list(words(f"{first}\n{second}")) == [*words(first), *words(second)]


@given(st.text(alphabet="<think>/ab \n", max_size=60))
def test_a_thought_and_what_follows_it_are_never_the_same_text(text: str) -> None:
    inside, after = thought(text), after_thinking(text)
    if inside is not None and after is not None:
        assert text.endswith(inside + "</think>" + after)


@pytest.mark.parametrize(
    ("completion", "inside"),
    [
        ("<think>a</think>b", "a"),
        ("a</think>b", "a"),
        ("x<think>a</think>b<think>c</think>d", "a</think>b<think>c"),
        ("<think></think>", ""),
        ("<think>a", None),
        ("<think>a</think>b<think>c", None),
        ("a", None),
    ],
)
def test_thought(completion: str, inside: str | None) -> None:
    assert thought(completion) == inside


def consistency(completion: str, target: str = "en", *, truncated: bool = False) -> Score:
    row = RewardInput("p", completion, "2", truncated=truncated)
    return REWARDS["language_consistency"].function(row, {"target": target})


def test_reward_is_the_share_of_the_thought_alone() -> None:
    mixed = f"<think>{ENGLISH} {CHINESE}</think>\n答案是 \\boxed{{5}}"
    assert consistency(mixed) == Score(pytest.approx(13 / 31), Outcome.WRONG, "5")
    assert consistency(f"<think>{ENGLISH}</think>答案是 5") == Score(1.0, Outcome.RIGHT)
    assert consistency(f"<think>{ENGLISH}</think>So", "zh") == Score(0.0, Outcome.WRONG)
    # Cut off in the answer: the thought is whole.
    assert consistency(f"<think>{ENGLISH}</think>So", truncated=True).reward == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "<think></think>\\boxed{2}",
        "<think>$1+1=2$ 2</think>\\boxed{2}",
        "<think>```\nhidden words\n```</think>\\boxed{2}",
        "<think>ok</think>\\boxed{2}",
        "<think>ok so</think>\\boxed{2}",
        "<think>an endless thought",
        "only an answer",
        "",
    ],
)
def test_no_words_no_reward(completion: str) -> None:
    score = consistency(completion)
    assert (score.reward, score.outcome) == (0.0, Outcome.UNPARSEABLE)


def test_foreign_text_cannot_hide_in_code_or_formulae() -> None:
    for opening, closing in (("$", "$"), ("`", "`"), ("```\n", "\n```"), ("```", "")):
        hidden = f"<think>ok then so {opening}{CHINESE}{closing}</think>\\boxed{{5}}"
        assert consistency(hidden).reward == pytest.approx(3 / 21)
        hidden = f"<think>好好好 {opening}{ENGLISH}{closing}</think>\\boxed{{5}}"
        assert consistency(hidden, "zh").reward == pytest.approx(3 / 16)


def test_the_fewest_words_to_look_at() -> None:
    function = REWARDS["language_consistency"].function
    row = RewardInput("p", "<think>so it is</think>", "")
    assert function(row, {"target": "en"}).reward == 1.0
    assert function(row, {"target": "en", "min_words": 4}).reward == 0.0
    assert function(row, {"target": "low", "languages": {"low": "z"}}).reward == 0.0
    with pytest.raises(ValueError, match="min_words = 0: must be a whole number of at least 1"):
        check_reward("language_consistency", {"target": "en", "min_words": 0})


def test_reward_with_toy_languages() -> None:
    options = {"target": "high", "languages": TOY}
    check_reward("language_consistency", options)
    row = RewardInput("p", "<think>A+B=C b 4</think><answer>C</answer>", "C")
    score = REWARDS["language_consistency"].function(row, options)
    assert score == Score(0.8, Outcome.WRONG, "C")


BLOCKS = ("\\begin{align}", "\\begin{gather}")


@pytest.mark.parametrize(
    "unit",
    [
        "\\(",
        "\\[",
        "$$",
        "$a",
        "`",
        "```",
        "\\begin{align}",
        "\\begin{align}\\begin{gather}",
        "$\\",
        "`a b c` ",
        "{a $",
    ],
)
def test_delimiters_that_are_never_closed_take_linear_time(unit: str) -> None:
    """Quadratic time would be minutes; the verifier's deadline would make them failures."""
    assert words_by_language("end " + unit * 50_000 + " end").total() >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "target = None: must be the name of a language"),
        ({"target": "english"}, "target = 'english': no language of this name.*'en'"),
        ({"target": "hihg", "languages": TOY}, "did you mean 'high'"),
        ({"target": "en", "langauges": {}}, "langauges: no such option.*languages"),
        ({"target": "en", "languages": ["a"]}, "languages = .*must map names"),
        ({"target": "x", "languages": {"x": ""}}, r"languages.x = ''"),
        ({"target": "x", "languages": {"x": 7}}, r"languages.x = 7"),
        ({"target": "x", "languages": {"x": "ab", "y": "bc"}}, r"languages.y: .*'b' is in 'x'"),
        ({"target": "x", "languages": {"x": "a b"}}, "' ' cannot be part of a word"),
        ({"target": "x", "languages": {"x": "a$"}}, "'\\$' cannot be part of a word"),
        ({"target": "x", "languages": {"x": "a'"}}, "cannot be part of a word"),
        ({"target": "x", "languages": {"x": "a\u0301"}}, "cannot be part of a word"),
        ({"target": "Latin", "languages": {"Latin": "ab"}}, "'Latin' must be lower case"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"rewards.language_consistency.options.*{message}"):
        check_reward("language_consistency", options)
