"""Overlap with evaluation questions, against a slow and obvious statement of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.decontamination import EvaluationNgrams, duplicate_key

QUESTION = "If 3 trains leave Paris at noon, when does the last one reach Lyon?"  # 14 words


@pytest.mark.parametrize(
    ("text", "overlaps"),
    [
        (QUESTION, True),
        ("Q: if 3 trains LEAVE paris, at noon - when   does\nthe last? Answer:", True),
        # The last ten words, then the last nine.
        ("from Paris at noon: when does the last one reach Lyon", True),
        ("from Berlin at noon: when does the last one reach Lyon", False),
        ("If 4 trains leave Paris at noon, does the last one reach Lyon?", False),
        ("when does the last one", False),  # a short text is not part of a question
        ("", False),
    ],
)
def test_ten_words_in_a_row(text: str, overlaps: bool) -> None:
    assert EvaluationNgrams.of([QUESTION]).overlaps(text) is overlaps


@pytest.mark.parametrize(
    ("text", "overlaps"),
    [
        ("What is 2+2?", True),
        ("what is  2 + 2", True),
        ("\uff37hat is 2\uff0b2\uff1f", True),
        ("What is: 2+2.", True),
        ("What is 2-2?", False),
        ("What is (2+2)?", False),
        ("What is 2+23?", False),
        ("So what is 2+2?", False),
        ("What is 2+2? And then some more words, up to ten", False),
    ],
)
def test_short_questions_are_compared_whole(text: str, overlaps: bool) -> None:
    assert EvaluationNgrams.of(["What is 2+2?"]).overlaps(text) is overlaps


def test_chinese_characters_are_words() -> None:
    ngrams = EvaluationNgrams.of(["小明有三个苹果，小红有五个苹果，一共有几个？"])
    assert ngrams.overlaps("已知小红有五个苹果，一共有九个梨")  # 小红有五个苹果一共有: 10
    assert not ngrams.overlaps("已知小红有五个苹果，一共花了九元")  # 小红有五个苹果一共: 9


WORDS = st.lists(st.sampled_from("abcd"), max_size=14)


@given(st.lists(WORDS, max_size=3), WORDS, st.integers(1, 6))
def test_against_brute_force(questions: list[list[str]], text: list[str], n: int) -> None:
    questions = [question for question in questions if question]

    def runs(found: list[str]) -> list[list[str]]:
        return [found[i : i + n] for i in range(len(found) - n + 1)]

    expected = any(
        question == text if len(question) < n else any(run in runs(question) for run in runs(text))
        for question in questions
    )
    built = EvaluationNgrams.of([", ".join(question) for question in questions], n=n)
    assert built.overlaps(" ".join(text)) is expected


@given(st.text(), st.integers(1, 12))
def test_a_question_overlaps_with_itself(question: str, n: int) -> None:
    question = f"So: {question}"
    assert EvaluationNgrams.of([question], n=n).overlaps(f"  {question}\n")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="n = 0"):
        EvaluationNgrams.of([QUESTION], n=0)
    with pytest.raises(ValueError, match=r"the question ' \?' has no words"):
        EvaluationNgrams.of([QUESTION, " ?"])


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("So  1+1 = 2.\n", "so 1+1\n= 2.", True),
        ("\uff11\uff0b\uff11", "1+1", True),
        ("1 1", "11", False),
        ("1+1", "1-1", False),
        ("so.", "so", False),
        ("\ud800", "\ud801", False),  # a cut token
    ],
)
def test_duplicate_key(left: str, right: str, same: bool) -> None:
    assert (duplicate_key(left) == duplicate_key(right)) is same


def test_the_key_is_the_same_in_every_process() -> None:
    assert duplicate_key("So  1+1\n") == duplicate_key("so 1+1")
    code = "from r1jax.data.decontamination import duplicate_key; print(duplicate_key('so 1+1'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == duplicate_key("so 1+1")
