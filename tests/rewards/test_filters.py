"""Filters of training texts: what each refuses, at its bounds."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.rewards.filters import (
    FILTERS,
    _longest_loop,
    _repeated_share,
    apply_filters,
    load_filters,
)


def keeps(name: str, text: str, **options: Any) -> bool:
    return apply_filters(text, load_filters({name: options})) is None


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [
        ("a b c d", 2, 0.0),
        ("a b a b", 2, 1 / 3),  # ab ba ab
        ("a a a a a", 1, 4 / 5),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repeated_share(text: str, n: int, share: float) -> None:
    assert _repeated_share(text.split(), n) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "phrase_words", "loop"),
    [
        ("a b c", 4, 1),
        ("a b b c", 4, 2),
        ("x a b a b a b y", 4, 3),
        ("x a b a b a b y", 1, 1),
        ("a b c a b c a b", 4, 2),  # a third one is not whole
        ("a a a b a a a b", 4, 3),
        ("a", 4, 1),
        ("", 4, 0),
    ],
)
def test_longest_loop(text: str, phrase_words: int, loop: int) -> None:
    assert _longest_loop(text.split(), phrase_words, 100) == loop


@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(1, 6))
def test_longest_loop_against_brute_force(found: list[str], phrase_words: int) -> None:
    expected = max(
        (
            times
            for period in range(1, phrase_words + 1)
            for start in range(len(found))
            for times in range(1, len(found) + 1)
            if found[start : start + period * times] == found[start : start + period] * times
            and start + period * times <= len(found)
        ),
        default=0,
    )
    assert _longest_loop(found, phrase_words, 100) == expected


def test_repetition() -> None:
    distinct = " ".join(f"word {i}" for i in range(500))
    assert keeps("repetition", distinct)
    # A short loop in a long text: a small share of its n-grams.
    assert keeps("repetition", distinct + " wait," * 20)
    assert not keeps("repetition", distinct + " wait," * 21)
    assert not keeps("repetition", distinct + " Wait, no. wait -- no!" * 11)
    assert not keeps("repetition", "我们再算一次，" * 21)
    assert keeps("repetition", distinct + " wait, no." * 11, phrase_words=1)
    # The same page three times is no loop of short phrases.
    page = " ".join(f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(100))
    assert not keeps("repetition", " ".join([page] * 3))
    assert keeps("repetition", " ".join([page] * 3), max_share=0.7)
    assert keeps("repetition", "a b a b", n=2, max_share=0.34)
    assert not keeps("repetition", "a b a b", n=2, max_share=0.33)


@pytest.mark.parametrize(
    "unit", ["-", "!", "=", "_", "😀", "ha", "0123456789", "\u0301", "|---|", "- ", "１", "。"]
)
def test_repetition_without_words(unit: str) -> None:
    assert not keeps("repetition", f"<think>so {unit * 100_000}</think>7")
    assert not keeps("repetition", unit * 101)
    assert keeps("repetition", "so " + unit * 3)


def test_repetition_keeps_lines_and_tables_and_refuses_long_runs_that_repeat() -> None:
    assert keeps("repetition", f"one\n{'-' * 80}\ntwo\n|---|---|---|---|---|\n|{'-' * 30}|")
    assert keeps("repetition", "-" * 101, max_characters=101)
    assert not keeps("repetition", "-" * 102, max_characters=101)
    run = "".join(chr(ord("a") + i * i % 26) + str(i) for i in range(100))  # 290 characters
    assert keeps("repetition", run)
    assert not keeps("repetition", run * 2)


def test_language_mixing_looks_at_the_thought() -> None:
    # 19 English words and one Chinese: 95%.
    thought = "word " * 19 + "好"
    assert keeps("language_mixing", f"<think>{thought}</think>好好好", target="en")
    assert not keeps("language_mixing", f"<think>{thought} 的</think>yes", target="en")
    assert keeps("language_mixing", f"<think>{thought} 的</think>", target="en", min_share=0.9)
    assert not keeps("language_mixing", f"<think>{thought}</think>", target="zh")
    assert keeps("language_mixing", "<think>$x$ 1</think>x", target="en")  # no words
    assert not keeps("language_mixing", "<think>so it is $我们先计算总数$</think>x", target="en")
    assert keeps("language_mixing", "好", target="en")  # no thought: that is for `format`
    toy = {"low": "ab", "high": "AB"}
    options = {"target": "high", "languages": toy, "min_share": 0.5}
    assert keeps("language_mixing", "<think>A+b</think>", **options)
    assert not keeps("language_mixing", "<think>A+b+a</think>", **options)


def test_format() -> None:
    tags = "<think>a</think><answer>2</answer>"
    assert keeps("format", tags) and not keeps("format", tags + " so")
    assert keeps("format", "<think>a</think>2", style="think")
    assert not keeps("format", "<think>a", style="think")


def test_long_paragraphs() -> None:
    assert keeps("long_paragraphs", "one two\n\nthree four", max_words=2)
    assert keeps("long_paragraphs", "one two\n \t\nthree four\n\n\n\nfive", max_words=2)
    assert not keeps("long_paragraphs", "one two\nthree", max_words=2)
    assert not keeps("long_paragraphs", "one\n\ntwo three four", max_words=2)
    assert keeps("long_paragraphs", "我们\n\n好", max_words=2)
    assert not keeps("long_paragraphs", "我们好", max_words=2)
    assert keeps("long_paragraphs", "<think>one two</think>", max_words=2)  # tags are no words
    assert not keeps("long_paragraphs", "word " * 301)
    assert keeps("long_paragraphs", "word " * 300)
    assert keeps("long_paragraphs", "\n" * 100_000)


def test_code_blocks_are_refused_in_the_thought_alone() -> None:
    block = "```python\nprint(1)\n```"
    assert not keeps("code_blocks", f"<think>{block}</think>1")
    for block in (
        "~~~\nx\n~~~",
        "So\n\n    x = 1\n",
        "\tx = 1",
        "<pre>x</pre>",
        " ~~~~py",
        "<CODE>",
    ):
        assert not keeps("code_blocks", f"<think>{block}</think>1"), block
    # Not behind a blank line, the rest of a list's item, no tag.
    for text in (
        "So\n    x = 1",
        "1. One\n\n    of it",
        "- One\n  of\n\n    it",
        "~~a~~",
        "x <pre",
    ):
        assert keeps("code_blocks", f"<think>{text} </think>1") == (text != "x <pre"), text
    assert keeps("code_blocks", f"<think>`print(1)`</think>{block}")
    assert keeps("code_blocks", block)


def test_length() -> None:
    text = "<think>one 2</think>三四"  # four words
    assert keeps("length", text) and keeps("length", "")
    assert keeps("length", text, min_words=4, max_words=4)
    assert not keeps("length", text, min_words=5)
    assert not keeps("length", text, max_words=3)


def test_the_first_filter_that_refuses_is_named_in_the_order_of_the_config() -> None:
    options = {"length": {"max_words": 3}, "code_blocks": {}, "format": {"style": "think"}}
    texts = [
        "<think>a</think>b",
        "<think>a",
        "<think>```a```</think>b",
        "<think>a b ```c d```</think>",
        "one two three four",
    ]
    counts = Counter(apply_filters(text, load_filters(options)) for text in texts)
    assert counts == {None: 1, "format": 1, "code_blocks": 1, "length": 2}
    backwards = load_filters(dict(reversed(options.items())))
    counts = Counter(apply_filters(text, backwards) for text in texts)
    assert counts == {None: 1, "format": 3, "code_blocks": 1}
    assert apply_filters("anything", {}) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetitions": {}}, r"filters\.repetitions: .*did you mean 'repetition'\?"),
        ({"xyz": {}}, r"filters\.xyz: no filter of this name; there are \['code_blocks', "),
        (
            {"repetition": {"max_shar": 1}},
            r"filters\.repetition\.max_shar: no such option; did you mean 'max_share'\?",
        ),
        ({"code_blocks": {"n": 1}}, r"filters\.code_blocks\.n: no such option"),
        ({"language_mixing": {}}, r"filters\.language_mixing\.target is missing"),
        (
            {"language_mixing": {"target": "eng"}},
            r"filters\.language_mixing\.target = 'eng': .*did you mean 'en'\?",
        ),
        (
            {"language_mixing": {"target": "x", "languages": {"x": ""}}},
            r"filters\.language_mixing\.languages\.x = ''",
        ),
        (
            {"language_mixing": {"target": "en", "min_share": 95}},
            r"filters\.language_mixing\.min_share = 95: a share is in 0 \.\. 1",
        ),
        ({"format": {"style": "xml"}}, r"filters\.format\.style = 'xml': not one of"),
        ({"repetition": {"n": 0}}, r"filters\.repetition\.n = 0: .*at least 1"),
        ({"repetition": {"n": 2.5}}, r"filters\.repetition\.n = 2\.5: must be a whole number"),
        ({"repetition": {"max_share": "1"}}, r"filters\.repetition\.max_share = '1'"),
        ({"repetition": {"max_repeats": 0}}, r"filters\.repetition\.max_repeats = 0"),
        ({"repetition": {"phrase_words": True}}, r"filters\.repetition\.phrase_words = True"),
        ({"long_paragraphs": {"max_words": 0}}, r"filters\.long_paragraphs\.max_words = 0"),
        ({"length": {"min_words": -1}}, r"filters\.length\.min_words = -1"),
        ({"length": {"min_words": 3, "max_words": 2}}, r"max_words = 2: .*at least 3"),
    ],
)
def test_bad_names_and_options(options: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_filters(options)


@given(st.text(), st.sampled_from(sorted(FILTERS)))
def test_any_text_is_kept_or_refused(text: str, name: str) -> None:
    options = {"target": "en"} if name == "language_mixing" else {}
    assert apply_filters(text, load_filters({name: options})) in (None, name)


def test_no_jax() -> None:
    code = (
        "import sys, r1jax.data.decontamination, r1jax.rewards.filters\n"
        "print({'jax', 'sympy', 'math_verify', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
