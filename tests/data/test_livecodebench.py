"""Rows in LiveCodeBench's form become prompts and hidden tests that the code reward can read."""

from __future__ import annotations

import base64
import json
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from livecodebench_rows import METHOD, PROGRAM, cases, compressed

from r1jax.data.example import Example
from r1jax.data.examples import load_examples
from r1jax.data.livecodebench import PRELUDE, _tests
from r1jax.rewards.code import Case, program_of, read_reference
from r1jax.settings.data import DataSection


def load(path: Path, row: dict[str, Any], **settings: Any) -> Example:
    path.write_text(json.dumps(row) + "\n")
    section = {"source": f"jsonl:{path}", "row_format": "livecodebench", **settings}
    (example,) = load_examples(DataSection.model_validate(section))
    return example


def test_programs_are_tested_by_their_output(tmp_path: Path) -> None:
    example = load(tmp_path / "a.jsonl", PROGRAM, fields={"domain": "platform"})
    assert example.prompt.startswith("Print the sum.\n\n")
    assert example.domain == "atcoder"
    reference = read_reference(example.answer)
    assert reference.language == "python" and reference.entry is None
    assert reference.cases == (Case("1 2\n", "3\n"), Case("3 4\n", "7\n"), Case("0 0\n", "0\n"))


def test_methods_are_called(tmp_path: Path) -> None:
    example = load(tmp_path / "a.jsonl", METHOD)
    assert "Add {n} to all." in example.prompt
    assert program_of(example.prompt) == METHOD["starter_code"].rstrip() + "\n"
    reference = read_reference(example.answer)
    assert reference.entry == "Solution.add"
    assert reference.cases == (Case([[1, 2], 3], [4, 5]), Case([["a"], "b"], ["ab"]))


def test_the_prelude_brings_names_and_takes_none_away() -> None:
    names: dict[str, Any] = {}
    exec(PRELUDE + "from __main__ import __doc__\n", names)
    for name in ("List", "Optional", "defaultdict", "Counter", "heappush", "lru_cache", "inf"):
        assert name in names
    assert names["bisect"].bisect_left([1, 3], 2) == 1  # the module, not its function
    assert eval("pow(2, 10, 1000), sum([1, 2])", names) == (24, 3)


class Naming:
    """Unpickling it would call a function."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("called"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"private_test_cases": compressed(Naming())}, "'private_test_cases': neither JSON nor"),
        ({"private_test_cases": compressed([1])}, "its pickle holds EMPTY_LIST, not only a text"),
        ({"private_test_cases": "%%%"}, "'private_test_cases': neither JSON nor"),
        ({"private_test_cases": "[{]"}, "'private_test_cases': neither JSON nor"),
        (
            {"public_test_cases": '[{"input": "1"}]'},
            "'public_test_cases': a test without the texts",
        ),
        ({"metadata": None}, "column 'metadata' (for row_format) is null; the row has metadata,"),
        ({**METHOD, "metadata": "{}"}, "'metadata': '{}' has no func_name, but there is starter"),
        (
            {**METHOD, "public_test_cases": json.dumps(cases(("[1", "2")))},
            "test 0 (public ones first) is functional, but not JSON",
        ),
    ],
)
def test_what_cannot_be_read_names_the_row_and_the_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(tmp_path / "a.jsonl", {**PROGRAM, **row})
    assert "a.jsonl:1: " in str(error.value)
    assert not Path("called").exists()


def test_a_reference_may_stand_in_a_row_as_it_is(tmp_path: Path) -> None:
    """JSON lines in the form of the reward need no conversion, and no JSON within JSON."""
    answer = {"language": "c", "tests": [{"input": "1\n", "output": "2\n"}]}
    example = load(tmp_path / "a.jsonl", {"prompt": "p", "answer": answer}, row_format=None)
    assert read_reference(example.answer).cases == (Case("1\n", "2\n"),)


# As `pickle` reads them: a call, an object's state, a size of 4 GiB, an id, no text, deep JSON.
HOSTILE = [
    b"cos\nsystem\n(S'true'\ntR.",
    b"Vx\n}(Va\nVb\nub.",
    b"Vx\n)R.",
    b"\x80\x04Nr" + (300_000_000).to_bytes(4, "little") + b".",
    b"\x80\x04\x8e" + (1 << 62).to_bytes(8, "little") + b".",
    b"Pfoo\n.",
    b"R.",
    b"",
    *map(pickle.dumps, (5, [1], "5", "{}", "[1]", "[null]", "[" * 100_000)),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_no_pickle_runs_or_breaks(number: int) -> None:
    packed = base64.b64encode(zlib.compress(HOSTILE[number])).decode()
    with pytest.raises(ValueError, match="column 'c': "):
        _tests(packed, "c")


@pytest.mark.parametrize("text", ["5", "null", "[1]", "[" * 100_000])
def test_plain_tests_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="column 'c': "):
        _tests(text, "c")
