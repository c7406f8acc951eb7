"""The forms of labelled steps, what is wrong with a row, and what is left to learn from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1jax.data.padded_rows import PaddedRows
from r1jax.data.step_labels import (
    EncodedSolution,
    check_both_labels,
    encode_step_labels,
    load_step_labels,
    step_arrays,
)
from r1jax.data.steps import cut_steps, join_steps
from r1jax.data.tokenizers import load_tokenizer
from r1jax.settings.data import DataSection
from r1jax.settings.section import SettingError
from r1jax.settings.steps import StepRule

SPACES = StepRule(separators=[" "])
PRM800K = {
    "labeler": "x",
    "question": {"problem": "1+2+3=", "ground_truth_answer": "6"},
    "label": {
        "finish_reason": "found_error",
        "steps": [
            {
                "completions": [
                    {"text": "1+2=4", "rating": -1, "flagged": False},
                    {"text": "1+2=3", "rating": 1, "flagged": False},
                ],
                "human_completion": None,
                "chosen_completion": 1,
            },
            {
                "completions": [{"text": "3", "rating": 0}, {"text": "3+3", "rating": None}],
                "human_completion": {"text": "3+3=6", "rating": None},
                "chosen_completion": None,
            },
            {
                "completions": [{"text": "7", "rating": -1}],
                "human_completion": None,
                "chosen_completion": None,
            },
            {"completions": None, "human_completion": None, "chosen_completion": None},
        ],
    },
}


def section(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> DataSection:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(source=f"jsonl:{path}", template="plain", **settings)


def test_columns_as_trl_has_them(tmp_path: Path) -> None:
    rows = (
        {"prompt": "1+2=", "completions": ["1+2=3", "3"], "labels": [True, False]},
        {"prompt": "1+3=", "completions": ["4"], "labels": [0.25]},
        {"prompt": "1+4=", "completions": ["a", "b"], "labels": [None, 1]},
    )
    found = load_step_labels(section(tmp_path, *rows), neutral=1.0)
    assert [(each.id, each.prompt, each.steps, each.labels) for each in found] == [
        (0, "1+2=", ("1+2=3", "3"), (1.0, 0.0)),
        (1, "1+3=", ("4",), (0.25,)),
        (2, "1+4=", ("a", "b"), (None, 1.0)),
    ]
    renamed = {"q": "1=", "steps": ["1"], "ok": [1]}
    fields = {"prompt": "q", "completions": "steps", "labels": "ok"}
    (row,) = load_step_labels(section(tmp_path, renamed, fields=fields), neutral=1.0)
    assert row.steps == ("1",)


@pytest.mark.parametrize("neutral", [1.0, 0.0, None])
def test_prm800k_gives_each_rated_completion_once(tmp_path: Path, neutral: float | None) -> None:
    found = load_step_labels(section(tmp_path, PRM800K), neutral=neutral)
    assert [(each.steps, each.labels) for each in found] == [
        (("1+2=4",), (0.0,)),
        (("1+2=3", "3"), (None, neutral)),
        (("1+2=3", "3+3"), (None, None)),
        (("1+2=3", "3+3=6", "7"), (None, None, 0.0)),
        (("1+2=3", "3+3=6"), (1.0, 1.0)),
    ]
    assert {each.id for each in found} == {0} and found[0].prompt == "1+2+3="


def test_a_row_of_prm800k_without_a_step_is_counted(tmp_path: Path) -> None:
    empty = json.loads(json.dumps(PRM800K))
    empty["label"]["steps"] = [{"completions": None, "chosen_completion": None}]
    kept, report = encoded(tmp_path, empty, PRM800K, max_tokens=99)
    assert len(kept) == 4 and "4 of 6 labelled solutions" in report
    assert "dropped: 2 without a label" in report


def test_every_line_of_a_file_in_the_form_of_prm800k() -> None:
    """Phases 1 and 2, and each way in which a labeller may end."""
    path = Path(__file__).parents[1] / "tiny_prm800k.jsonl"
    found = load_step_labels(DataSection(source=f"jsonl:{path}", template="plain"), neutral=None)
    right, wrong = 1.0, 0.0
    assert [(each.id, each.steps, each.labels) for each in found] == [
        (0, ("1+2=4",), (wrong,)),
        (0, ("3",), (None,)),
        (0, ("1+2=3", "3+3=7"), (None, wrong)),
        (0, ("1+2=3", "3+3=6", "6"), (right, right, right)),
        (1, ("4+5=9", "9-2=8"), (None, wrong)),
        (1, ("4+5=9", "9-2=7"), (None, right)),
        (1, ("4+5=9", "9"), (None, None)),
        (1, ("4+5=9",), (None,)),
        (2, ("9-9=1",), (wrong,)),
        (2, ("9", "9-9=9"), (None, wrong)),
        (2, ("9", "8"), (None, wrong)),
        (2, ("9",), (None,)),
        (3, (), ()),
    ]


def test_other_spellings_of_prm800k(tmp_path: Path) -> None:
    """A step that was written by the labeller as a text, and a problem without steps."""
    row = json.loads(json.dumps(PRM800K))
    row["label"]["steps"][1]["human_completion"] = "3+3=6"
    broken = {**row, "label": {"steps": None, "finish_reason": "bad_problem"}}
    *_, last, nothing = load_step_labels(section(tmp_path, row, broken), neutral=1.0)
    assert (last.steps, last.labels) == (("1+2=3", "3+3=6"), (1.0, 1.0)) and nothing.steps == ()


def test_the_last_step_of_prm800k_holds_its_answer() -> None:
    """Which has empty lines: the documented rule leaves them within the step."""
    rule = StepRule(pattern=r"(?<!# Answer)\n\n(?!# Answer)", join="\n\n")
    steps = ("I add.", "It is 6.\n\n# Answer\n\n6")
    text = join_steps(steps, rule)
    assert text == "I add.\n\nIt is 6.\n\n# Answer\n\n6"
    assert cut_steps(text, rule) == ["I add.\n\n", steps[1]]
    assert len(cut_steps(text, StepRule())) == 4


GOOD = {"prompt": "1=", "completions": ["1", "2"], "labels": [1, 0]}


@pytest.mark.parametrize(
    ("change", "key", "problem"),
    [
        ({"labels": [1]}, "fields.labels", "1 labels of 2 steps"),
        ({"labels": [1, 0, 1]}, "fields.labels", "3 labels of 2 steps"),
        ({"labels": [1, "0"]}, "fields.labels", "step 2: label = '0'"),
        ({"labels": [1, 2]}, "fields.labels", "step 2: label = 2"),
        ({"labels": [-1, 1]}, "fields.labels", "PRM800K's ratings"),
        ({"labels": [math.nan, 1]}, "fields.labels", "label = nan"),
        ({"labels": "right"}, "fields.labels", "is a str; needs a list"),
        ({"labels": None}, "fields", "'labels'"),
        ({"completions": ["1", " "]}, "fields.completions", "step 2 is empty"),
        ({"completions": []}, "fields.completions", "an empty list"),
        ({"completions": ["1", {"a": 1}]}, "fields.completions", "step 2 is a dict"),
        ({"prompt": "  "}, "fields.prompt", "is empty"),
    ],
)
def test_a_wrong_row_is_named(
    tmp_path: Path, change: dict[str, Any], key: str, problem: str
) -> None:
    with pytest.raises(SettingError) as caught:
        load_step_labels(section(tmp_path, GOOD, {**GOOD, **change}), neutral=1.0)
    assert caught.value.key == key
    assert "rows.jsonl:2: " in caught.value.problem and problem in caught.value.problem


def test_wrong_rows_of_prm800k_are_named(tmp_path: Path) -> None:
    for path, value, problem in (
        (("steps", 0, "chosen_completion"), 5, "chosen_completion = 5 of 2"),
        (("steps", 0, "completions", 0, "rating"), 3, "rating = 3"),
        (("steps", 1, "completions", 0, "text"), "", "step 2 is empty"),
        (("steps", 1, "human_completion"), 7, "step 2, human_completion: .* is a int"),
        (("steps",), "x", "label.steps is a str"),
    ):
        row = json.loads(json.dumps(PRM800K))
        node = row["label"]
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
        with pytest.raises(SettingError, match=f"rows.jsonl:2: .*{problem}"):
            load_step_labels(section(tmp_path, PRM800K, row), neutral=1.0)


def encoded(tmp_path: Path, *rows: dict[str, Any], max_tokens: int = 30) -> Any:
    data = section(tmp_path, *rows)
    solutions = load_step_labels(data, neutral=1.0)
    tokenizer = load_tokenizer("characters:running_total")
    return encode_step_labels(solutions, data, SPACES, tokenizer, max_tokens=max_tokens)


def test_tokens_ends_and_labels(tmp_path: Path) -> None:
    row = {"prompt": "1+2=", "completions": ["1+2=3", "3"], "labels": [1, None]}
    (one,), report = encoded(tmp_path, row)
    tokenizer = load_tokenizer("characters:running_total")
    assert tokenizer.decode(one.tokens) == "1+2=1+2=3 3"
    assert one.ends.tolist() == [9, 10]  # the separator, and the last character
    np.testing.assert_array_equal(one.labels, [1, np.nan])
    assert report == "1 of 1 labelled solutions, the longest has 11 tokens"
    arrays = step_arrays([one, one], 16)
    assert arrays["labelled"].sum() == 2 and arrays["labelled"][0, 9] == 1
    assert arrays["labels"][0, 9] == 1 and arrays["tokens"].shape == (2, 16)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = (
        {"prompt": "1=", "completions": ["1", "2"], "labels": [1, 0]},
        {"prompt": "1=", "completions": ["1 1", "2"], "labels": [1, 0]},
        {"prompt": "1=", "completions": ["1" * 40], "labels": [1]},
        {"prompt": "1=", "completions": ["1"], "labels": [None]},
    )
    kept, report = encoded(tmp_path, *rows)
    assert [row.id for row in kept] == [0]
    for reason in ("1 cut into other steps by step_rule", "1 too long", "1 without a label"):
        assert reason in report
    assert "row 1: 2 labels, 3 steps" in report
    with pytest.raises(SettingError, match="nothing is left to learn from: 0 of 1"):
        encoded(tmp_path, rows[3])


def test_steps_of_one_label_teach_nothing(tmp_path: Path) -> None:
    rows, _ = encoded(tmp_path, {"prompt": "1=", "completions": ["1", "2"], "labels": [1, 0.5]})
    with pytest.raises(SettingError, match="all 2 labelled steps are right"):
        check_both_labels(rows)
    rows, _ = encoded(tmp_path, {"prompt": "1=", "completions": ["1", "2"], "labels": [1, 0.4]})
    check_both_labels(rows)


def test_the_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    rows, _ = encoded(
        tmp_path,
        *(
            {"prompt": f"{i}=", "completions": ["1", "2" * (1 + i)], "labels": [1, 0]}
            for i in range(7)
        ),
    )

    def stream(**shares: int) -> PaddedRows[EncodedSolution]:
        return PaddedRows(rows, step_arrays, seed=3, length_bucket=8, **shares)

    whole = stream()
    first, state = whole.take(4), whole.state()
    assert first["tokens"].shape[1] % 8 == 0
    following = whole.take(4)
    again = stream()
    again.restore(state)
    np.testing.assert_array_equal(again.take(4)["tokens"], following["tokens"])
    halves = [stream(process_index=i, process_count=2).take(4) for i in range(2)]
    for name, array in first.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)
