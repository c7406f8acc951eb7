"""A dataset of kept completions: written whole or not at all, read back equal, also as TFDS."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data.dataset_files import (
    DatasetRow,
    Provenance,
    dataset_card,
    read_dataset,
    write_dataset,
    write_tfds,
)
from r1jax.data.examples import load_examples
from r1jax.settings.data import DataSection

PROVENANCE = Provenance(
    checkpoint="zero",
    stage="cold_start",
    seed=7,
    step=3,
    sample_index=15,
    problem_id=2**40,
    sampling={"temperature": 1.0, "top_p": None, "stop": "", "greedy": False, "top_k": 3},
    versions={"r1jax": "0.1.0", "python": "3.11"},
    rewriter="rules",
)
ROW = DatasetRow(
    prompt="7+5=",
    response="<think>7+5=12</think>\n\n12",
    answer="12",
    domain="maths",
    tokens=14,
    reward=0.1 + 0.2,
    provenance=PROVENANCE,
)
ROWS = [
    ROW,
    replace(
        ROW, prompt="一加一?\u2028", response="é\x00\r\n\x85", answer="", domain="", reward=-1e-300
    ),
    replace(ROW, reward=2, provenance=replace(PROVENANCE, rewriter=None, sampling={}, versions={})),
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def words(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return text.filter(str.strip)


SOME_ROWS = st.lists(
    st.builds(
        DatasetRow,
        prompt=words(TEXT),
        response=words(TEXT),
        answer=TEXT,
        domain=TEXT,
        tokens=st.integers(1, 2**62),
        reward=st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
        provenance=st.just(PROVENANCE),
    ),
    min_size=1,
    max_size=5,
)


@settings(deadline=None)
@given(SOME_ROWS)
def test_rows_come_back_equal(tmp_path_factory: pytest.TempPathFactory, rows: list[DatasetRow]):
    path = tmp_path_factory.mktemp("rows") / "dataset.jsonl"
    write_dataset(path, iter(rows))
    assert read_dataset(path) == rows
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(rows)
    examples = load_examples(DataSection(source=f"jsonl:{path}"))
    assert [(e.prompt, e.answer, e.domain) for e in examples] == [
        (row.prompt, row.answer, row.domain) for row in rows
    ]


def test_a_line_is_plain_json_with_the_documented_columns(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.jsonl", [ROW])
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert list(row) == [
        *("prompt", "response", "answer", "domain", "tokens", "reward", "provenance")
    ]
    assert row["provenance"]["sampling"]["temperature"] == 1.0
    assert row["provenance"]["problem_id"] == 2**40


def test_nothing_is_written_unless_all_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_dataset(path, ROWS)
    before = path.read_bytes()

    def failing() -> Iterator[DatasetRow]:
        yield from ROWS * 1000
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_dataset(path, failing())
    with pytest.raises(ValueError, match=r"a\.jsonl: no rows to write"):
        write_dataset(path, [])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_dataset(path, [ROW])
    assert read_dataset(path) == [ROW]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " \n"}, "prompt = ' \\n': must not be blank"),
        ({"response": None}, "response = None: must be text"),
        ({"response": "\ud800"}, "response = '\\ud800': no Unicode text"),
        ({"answer": 12}, "answer = 12: must be text"),
        ({"tokens": 0}, "tokens = 0: must be an int of at least 1"),
        ({"tokens": 3.0}, "tokens = 3.0: must be an int"),
        ({"tokens": True}, "tokens = True: must be an int"),
        ({"tokens": np.int64(3)}, "must be an int"),
        ({"reward": float("nan")}, "reward = nan: must be a finite int or float"),
        ({"reward": np.float32(1)}, "must be a finite int or float"),
        ({"reward": False}, "reward = False"),
        ({"provenance": {"checkpoint": "zero"}}, "must be a Provenance"),
    ],
)
def test_bad_rows_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(ROW, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ""}, "provenance.checkpoint = ''"),
        ({"stage": 3}, "provenance.stage = 3: must be text"),
        ({"seed": -1}, "provenance.seed = -1: must be an int of at least 0"),
        ({"step": None}, "provenance.step = None"),
        ({"sample_index": "0"}, "provenance.sample_index = '0'"),
        ({"problem_id": 1.5}, "provenance.problem_id = 1.5"),
        ({"sampling": [("top_p", 1)]}, "provenance.sampling = [('top_p', 1)]: must be a dict"),
        ({"sampling": {"top_p": float("inf")}}, "provenance.sampling.top_p = inf"),
        ({"sampling": {"stop": ["a"]}}, "provenance.sampling.stop = ['a']"),
        ({"sampling": {1: 2}}, "provenance.sampling: a name = 1"),
        ({"versions": {"jax": 0.1}}, "provenance.versions.jax = 0.1: must be text"),
        ({"rewriter": ""}, "provenance.rewriter = ''"),
    ],
)
def test_bad_provenance_cannot_be_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(PROVENANCE, **change)


def columns(**changes: Any) -> dict[str, Any]:
    row = {**vars(ROW), "provenance": vars(PROVENANCE), **changes}
    return {name: value for name, value in row.items() if value is not ...}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (columns(domain=...), "a.jsonl:3: domain is missing"),
        (columns(rewards=1.0), "a.jsonl:3: rewards is not a column; did you mean 'reward'?"),
        (columns(tokens="3"), "a.jsonl:3: tokens = '3': must be an int"),
        (columns(reward="nan"), "a.jsonl:3: reward = 'nan'"),
        (columns(provenance=[]), "a.jsonl:3: provenance = []: must be a JSON object"),
        (
            columns(provenance={**vars(PROVENANCE), "top_p": 1}),
            "a.jsonl:3: provenance.top_p is not a column; there are checkpoint, stage",
        ),
        (columns(provenance={"checkpoint": "zero"}), "a.jsonl:3: provenance.stage is missing"),
        (
            columns(provenance={**vars(PROVENANCE), "seed": -1}),
            "a.jsonl:3: provenance.seed = -1",
        ),
    ],
)
def test_a_bad_row_is_an_error_that_names_line_and_column(tmp_path, row, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(columns())}\n\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_dataset(path)


def test_a_torn_file_and_a_missing_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.jsonl"):
        read_dataset(path)
    write_dataset(path, ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not a JSON line"):
        read_dataset(path)


def from_tfds(data_dir: Path, name: str) -> DataSection:
    return DataSection(source=f"tfds:{name}", options={"data_dir": str(data_dir)})


def test_the_same_rows_as_tfds(tmp_path: Path) -> None:
    path = tmp_path / "dataset.jsonl"
    rows = [replace(ROWS[i % 3], prompt=f"{i}", tokens=i + 1) for i in range(30)]
    write_dataset(path, rows)
    folder = write_tfds(path, tmp_path / "tfds", "kept_rows")
    assert folder == tmp_path / "tfds" / "kept_rows" / "1.0.0"
    assert any("array_record" in file.name for file in folder.iterdir())
    examples = load_examples(from_tfds(tmp_path / "tfds", "kept_rows"))
    assert list(examples) == list(load_examples(DataSection(source=f"jsonl:{path}")))
    # And every column, exactly.
    source = tfds.builder("kept_rows", data_dir=tmp_path / "tfds").as_data_source("train")
    for row, found in zip(rows, source, strict=True):
        assert found["response"].decode() == row.response
        assert found["tokens"] == row.tokens and found["reward"] == row.reward
        assert Provenance(**json.loads(found["provenance"])) == row.provenance
    assert "tensorflow" not in sys.modules


def test_tfds_of_a_later_run_replaces_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "dataset.jsonl"
    for rows in (ROWS, [replace(ROW, prompt="another")]):
        write_dataset(path, rows)
        write_tfds(path, tmp_path, "kept_rows")
        examples = load_examples(from_tfds(tmp_path, "kept_rows"))
        assert [example.prompt for example in examples] == [row.prompt for row in rows]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Kept-Rows", "name = 'Kept-Rows': TFDS needs lower_case_with_underscores"),
        ("kept/rows", "lower_case_with_underscores"),
        ("r1jax_tasks", "name = 'r1jax_tasks': TFDS has a dataset of this name"),
    ],
)
def test_names_that_tfds_would_not_read_back(tmp_path: Path, name: str, message: str) -> None:
    write_dataset(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_tfds(tmp_path / "a.jsonl", tmp_path, name)


def test_an_empty_file_becomes_no_tfds_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"a\.jsonl: no rows to write"):
        write_tfds(tmp_path / "a.jsonl", tmp_path, "kept_rows")


def test_card_counts_rows_and_mean_tokens_by_domain() -> None:
    lengths = {"maths": [10, 20, 60], "code": [5], "": [1, 2]}
    rows = [
        replace(ROW, domain=domain, tokens=tokens)
        for domain, each in lengths.items()
        for tokens in each
    ]
    card = dataset_card(rows)
    assert card == {
        "rows": 6,
        "mean_tokens": 98 / 6,
        "domains": {
            "": {"rows": 2, "mean_tokens": 1.5},
            "code": {"rows": 1, "mean_tokens": 5.0},
            "maths": {"rows": 3, "mean_tokens": 30.0},
        },
    }
    assert list(card["domains"]) == ["", "code", "maths"]
    assert json.loads(json.dumps(card)) == card
    assert dataset_card([]) == {"rows": 0, "mean_tokens": None, "domains": {}}
