"""Questions with right and wrong answers become multiple choice that no position gives away."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data.choices import lettered
from r1jax.data.example import Example
from r1jax.data.examples import load_examples
from r1jax.settings.data import DataSection

texts = st.text("abcxyz 019\\", min_size=1).filter(lambda text: text.strip())


@given(texts, st.lists(texts, min_size=2, max_size=10, unique_by=str.strip), st.randoms())
def test_the_letter_is_the_right_answers_and_no_order_of_columns_matters(
    question: str, answers: list[str], random: Any
) -> None:
    right, *wrong = answers
    prompt, letter = lettered(question, right, wrong)
    asked, options = prompt.split("\n\n")
    assert asked == question.strip()
    lines = dict(line.split(") ", 1) for line in options.split("\n"))
    assert list(lines) == list("ABCDEFGHIJ")[: len(answers)]
    assert sorted(lines.values()) == sorted(answer.strip() for answer in answers)
    assert lines[letter] == right.strip()
    # Were another answer the right one, the same options would stand in the same places.
    shuffled = random.sample(answers, len(answers))
    assert lettered(question, shuffled[0], shuffled[1:])[0] == prompt


def test_every_letter_is_right_about_as_often() -> None:
    letters = Counter(lettered(f"{i}?", "yes", ["no", "perhaps", "never"])[1] for i in range(2000))
    # 500 each; the standard deviation is 19.
    assert set(letters) == set("ABCD") and all(abs(n - 500) < 100 for n in letters.values())


@pytest.mark.parametrize("count", [0, 10])
def test_options_need_letters(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} wrong answers: needs 1 to 9"):
        lettered("q", "right", [f"wrong {i}" for i in range(count)])


def load(path: Path, rows: list[dict[str, Any]], **settings: Any) -> list[Example]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"source": f"jsonl:{path}", **settings}
    return list(load_examples(DataSection.model_validate(section)))


ROW = {"Question": "2 + 2?", "Right": "So #### 4", "Wrong 1": 5, "Wrong 2": "22\n"}
SETTINGS: dict[str, Any] = {
    "fields": {"prompt": "Question", "answer": "Right"},
    "wrong_answers": ["Wrong 1", "Wrong 2"],
    "answer_pattern": "#### (.+)",
}


def test_a_dataset_names_the_columns(tmp_path: Path) -> None:
    (example,) = load(tmp_path / "a.jsonl", [ROW], **SETTINGS)
    assert (example.prompt, example.answer) == lettered("2 + 2?", "4", ["5", "22"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"wrong_answers": ["Wrong 3"]},
            "a.jsonl:1: column 'Wrong 3' (for wrong_answers) does not",
        ),
        ({"fields": {"prompt": "Question"}}, "column 'answer' (for answer) does not exist"),
        (
            {"source": "task:running_total", "fields": {}, "answer_pattern": None},
            "wrong_answers: has no effect on a task",
        ),
    ],
)
def test_mistakes(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path / "a.jsonl", [ROW], **{**SETTINGS, **change})
