"""Rows of any source become the same examples by config alone, or an error that says where."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from r1jax.data.example import Example, Message
from r1jax.data.examples import load_examples, row_label
from r1jax.data.prompts import encode_prompts
from r1jax.data.tokenizers import load_tokenizer
from r1jax.settings.data import DataSection

GSM8K = [
    {
        "question": "Natalia sold 48 clips in April and half as many in May. How many in all?",
        "answer": "In May she sold 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72",
    },
    {"question": "What do 3 cars at $1,200 cost?", "answer": "3*1200=3600\n#### 3,600 "},
    {"question": "And #### in the text?", "answer": "Not #### 1 but\n#### -5.5\n"},
]
GSM8K_SETTINGS: dict[str, Any] = {
    "fields": {"prompt": "question", "answer": "answer"},
    "answer_pattern": r"####\s*(.+)",
}


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def load(source: str, **settings: Any) -> Sequence[Example]:
    return load_examples(DataSection.model_validate({"source": source, **settings}))


def test_gsm8k_rows_by_config_alone(tmp_path: Path) -> None:
    examples = load(write(tmp_path / "gsm8k.jsonl", GSM8K), **GSM8K_SETTINGS)
    assert [e.answer for e in examples] == ["72", "3,600", "-5.5"]
    assert [e.prompt for e in examples] == [row["question"] for row in GSM8K]
    assert [e.id for e in examples] == [0, 1, 2]
    assert all(e.text is None for e in examples)


def test_columns_of_the_fields_own_names_need_no_mapping(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "answer": 2, "domain": "maths", "text": "1+1=2", "other": [1]}]
    (example,) = load(write(tmp_path / "a.jsonl", rows))
    assert example == Example(id=0, prompt="1+1=", answer="2", text="1+1=2", domain="maths")


def test_pretraining_text_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"body": "once"}, {"body": "upon"}])
    assert [e.text for e in load(source, fields={"text": "body"})] == ["once", "upon"]


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?", "name": "left alone"},
    {"role": "assistant", "content": 2},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def test_conversations_need_no_answer(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1=", "response": "2"},
        {"messages": TALK},
        {"prompt": "own", "messages": TALK, "answer": "4"},
        {"prompt": "1+1=", "answer": "2"},
    ]
    messages = (
        Message("system", "Be brief."),
        Message("user", "1+1?"),
        Message("assistant", "2"),
        Message("user", "2+2?"),
        Message("assistant", "4"),
    )
    assert list(load(write(tmp_path / "a.jsonl", rows))) == [
        Example(id=0, prompt="1+1=", answer="", response="2"),
        Example(id=1, prompt="1+1?", answer="", messages=messages),
        Example(id=2, prompt="own", answer="4", messages=messages),
        Example(id=3, prompt="1+1=", answer="2"),
    ]


def test_the_kind_of_conversation_that_fields_name_is_the_one_read(tmp_path: Path) -> None:
    rows = [{"q": "1+1?", "out": "2", "response": "three", "messages": TALK, "chat": TALK[:3]}]
    source = write(tmp_path / "a.jsonl", rows)
    (named,) = load(source, fields={"prompt": "q", "response": "out"})
    assert (named.prompt, named.response, named.messages) == ("1+1?", "2", ())
    (named,) = load(source, fields={"messages": "chat"})
    assert (named.response, len(named.messages)) == (None, 3)
    (both,) = load(source)
    assert (both.response, len(both.messages)) == ("three", 5)


def test_conversations_that_open_with_the_same_question_are_on_one_side(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for i in range(60):
        asked = {"role": "user", "content": f"How much is {i}+1?"}
        rows.append({"messages": [asked, {"role": "assistant", "content": "?"}]})
        rows.append({"messages": [{"role": "system", "content": "s"}, asked, *TALK[2:]]})
        rows.append({"prompt": asked["content"], "answer": "1"})
    source = write(tmp_path / "a.jsonl", rows)
    sides = [
        {e.id for e in load(source, split=split, held_out_fraction=0.3)}
        for split in ("train", "held_out")
    ]
    assert all(
        len({i in sides[0] for i in range(first, first + 3)}) == 1 for first in range(0, 180, 3)
    )
    assert all(sides) and sides[0] | sides[1] == set(range(180))


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"response": "2"}, {}, "column 'prompt' (for prompt) does not exist"),
        ({"q": "1", "response": "2"}, {"prompt": "q", "answer": "a"}, "column 'a' (for answer)"),
        ({"prompt": "1"}, {"response": "out"}, "column 'out' (for response) does not exist"),
        ({"body": "1", "out": "2"}, {"text": "body", "response": "out"}, "column 'prompt' (for"),
        ({"prompt": "1"}, {"messages": "chat"}, "column 'chat' (for messages) does not exist"),
        ({"messages": None}, {"messages": "messages"}, "column 'messages' (for messages) is null"),
        ({"messages": "hi"}, {}, "column 'messages' is a str; needs a list of {role, content}"),
        ({"messages": []}, {}, "column 'messages' has no user message"),
        ({"messages": TALK[2:3]}, {}, "column 'messages' has no user message"),
        ({"messages": [*TALK, "bye"]}, {}, "'messages', message 5 is a str; needs {role, content}"),
        (
            {"messages": [{"from": "function", "value": "hi"}]},
            {},
            "message 0: from = 'function'; known: system, user, assistant, human, gpt",
        ),
        ({"messages": [{"from": "human"}]}, {}, "message 0 has no role; it has from"),
        (
            {"messages": [{"role": "user", "content": None}]},
            {},
            "message 0 has null content; it has content, role",
        ),
        (
            {"messages": [{"role": "gpt", "content": "hi"}]},
            {},
            "message 0: role = 'gpt'; known: system, user, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            {},
            "message 0: content is a list; needs text",
        ),
        ({"prompt": "1", "response": ["2"]}, {}, "column 'response' is a list; needs text"),
        ({"messages": TALK}, {"mesages": "x"}, "fields.mesages: did you mean 'messages'"),
    ],
)
def test_conversation_mistakes(tmp_path: Path, row, fields, message: str) -> None:
    source = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(source, fields=fields)
    assert "a.jsonl:1" in str(error.value) or "fields." in message


def test_blank_lines_bom_and_unicode_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = '{"prompt": "a\u2028b", "answer": "1"}'
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\r\n\n  \n{row}".encode())
    assert [e.prompt for e in load(f"jsonl:{path}")] == ["a\u2028b"] * 2


def test_limit_takes_the_first_rows_of_the_split_and_ids_stay(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "answer": "1"} for i in range(100)]
    source = write(tmp_path / "a.jsonl", rows)
    assert [e.id for e in load(source, limit=3)] == [0, 1, 2]
    held_out = load(source, split="held_out", held_out_fraction=0.3)
    limited = load(source, split="held_out", held_out_fraction=0.3, limit=3)
    assert list(limited) == list(held_out[:3])
    assert all(e.prompt == f"q{e.id}" for e in held_out)


def test_train_and_held_out_are_disjoint_even_with_duplicates(tmp_path: Path) -> None:
    questions = [f"How much is {i}+{j}?" for i in range(20) for j in range(10)]
    # Every question twice, the second time with other white space, another answer, far away.
    rows = [{"prompt": q, "answer": "1"} for q in questions]
    rows += [{"prompt": f" {q.replace(' ', '  ')}\n", "answer": "2"} for q in reversed(questions)]
    source = write(tmp_path / "a.jsonl", rows)
    train = load(source, split="train", held_out_fraction=0.25)
    held_out = load(source, split="held_out", held_out_fraction=0.25)
    normal = [{" ".join(e.prompt.split()) for e in split} for split in (train, held_out)]
    assert not normal[0] & normal[1]
    assert normal[0] | normal[1] == set(questions)
    assert {e.id for e in train} | {e.id for e in held_out} == set(range(400))
    assert 0.15 < len(held_out) / 400 < 0.35


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "answer": "1"}\n\n{"prompt": "b"\n', "a.jsonl:3: not a JSON line"),
        ('{"prompt": "a", "answer": "1"}\n[1]\n', "a.jsonl:2: a list; needs one JSON object"),
        (b'{"prompt": "\xff", "answer": "1"}\n', "a.jsonl:1: not a JSON line"),
        (
            '{"question": "a", "answer": "1"}\n',
            "column 'prompt' (for prompt) does not exist; the row has answer, question",
        ),
        ('{"prompt": "a", "answer": "1"}\n\n{"prompt": "a"}\n', "a.jsonl:3: column 'answer'"),
        ('{"prompt": "a", "answer": null}\n', "column 'answer' (for answer) is null"),
        ('{"prompt": ["a"], "answer": "1"}\n', "column 'prompt' is a list"),
        ("", "split = 'train' has no rows"),
    ],
)
def test_bad_files_are_errors_that_name_the_line(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        load(f"jsonl:{path}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fields": {"promt": "question"}}, "fields.promt: did you mean 'prompt'"),
        ({"fields": {"prompt": "query", "answer": "answer"}}, "column 'query' (for prompt)"),
        ({"fields": {**GSM8K_SETTINGS["fields"], "domain": "subject"}}, "column 'subject'"),
        ({**GSM8K_SETTINGS, "answer_pattern": r"boxed\{(.+)\}"}, "answer_pattern: "),
        ({**GSM8K_SETTINGS, "answer_pattern": r"#### .+"}, "has no group"),
        ({**GSM8K_SETTINGS, "answer_pattern": r"#### (.+"}, "answer_pattern: missing )"),
        ({**GSM8K_SETTINGS, "split": "held_out"}, "set held_out_fraction"),
        (
            {**GSM8K_SETTINGS, "split": "test", "held_out_fraction": 0.1},
            "split: with held_out_fraction",
        ),
        ({**GSM8K_SETTINGS, "options": {"seed": 1}}, "options.seed: no option of jsonl"),
    ],
)
def test_config_mistakes(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(write(tmp_path / "g.jsonl", GSM8K), **settings)


def test_an_answer_without_match_names_its_row(tmp_path: Path) -> None:
    rows = [*GSM8K, {"question": "q", "answer": "no mark here"}]
    with pytest.raises(
        ValueError, match=r"answer_pattern: .*g\.jsonl:4: .* ends in 'no mark here'"
    ):
        load(write(tmp_path / "g.jsonl", rows), **GSM8K_SETTINGS)


def test_a_pattern_that_never_ends_names_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1jax.data.limits.PATTERN_SECONDS", 0.2)
    source = write(tmp_path / "g.jsonl", [{"question": "q", "answer": "a" * 60 + "b"}])
    with pytest.raises(ValueError, match=r"answer_pattern: .*g\.jsonl:1: takes longer than 0.2 s"):
        load(source, **{**GSM8K_SETTINGS, "answer_pattern": "((?:a+)+)$"})


def test_prompts_that_are_messages_and_answers_that_are_nested(tmp_path: Path) -> None:
    message = {"role": "user", "content": "What is 1+1?"}
    row = {"prompt": [message], "reward_model": {"ground_truth": "2", "style": "rule"}}
    source = write(tmp_path / "a.jsonl", [row])
    nested = {"answer": "reward_model.ground_truth"}
    for fields in (nested, {"prompt": "prompt", **nested}, {"messages": "prompt", **nested}):
        (example,) = load(source, fields=fields)
        assert (example.prompt, example.answer) == ("What is 1+1?", "2")
        assert example.columns == row
    system = {"role": "system", "content": "Be brief."}
    source = write(tmp_path / "b.jsonl", [{"prompt": [system, message], "answer": "2"}])
    (example,) = load(source)
    assert (example.prompt, example.history) == ("What is 1+1?", (Message("system", "Be brief."),))
    source = write(tmp_path / "c.jsonl", [{"prompt": TALK, "answer": "2"}])
    with pytest.raises(ValueError, match="column 'prompt' ends with a message of the assistant"):
        load(source)


def test_rows_that_are_lists_of_turns(tmp_path: Path) -> None:
    others = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    first, second = load(write(tmp_path / "a.jsonl", [TALK[1:3], {"messages": others}]))
    assert first.messages == second.messages == (Message("user", "1+1?"), Message("assistant", "2"))
    assert first.prompt == second.prompt == "1+1?"


def test_a_response_may_be_a_list_of_one_message(tmp_path: Path) -> None:
    row = {"prompt": TALK[:2], "completion": TALK[2:3]}
    (example,) = load(write(tmp_path / "a.jsonl", [row]), fields={"response": "completion"})
    assert (example.prompt, example.response) == ("1+1?", "2")
    assert example.history == (Message("system", "Be brief."),)


def test_a_column_that_is_called_as_a_field_is_not_read_unasked(tmp_path: Path) -> None:
    row = {"problem": "1+1?", "answer": "2", "domain": ["arithmetic", "addition"]}
    (example,) = load(write(tmp_path / "a.jsonl", [row]), fields={"prompt": "problem"})
    assert example == Example(id=0, prompt="1+1?", answer="2") and example.columns == row
    with pytest.raises(ValueError, match="column 'domain' is a list"):
        load(write(tmp_path / "a.jsonl", [row]), fields={"prompt": "problem", "domain": "domain"})
    # Of other forms, too, wherever some columns are named; null: not read at all.
    row |= {"response": ["a", "b"], "messages": "none", "text": {"body": "x"}, "domain": "algebra"}
    source = write(tmp_path / "b.jsonl", [row])
    (example,) = load(source, fields={"prompt": "problem"})
    assert example == Example(id=0, prompt="1+1?", answer="2", domain="algebra")
    (example,) = load(source, fields={"prompt": "problem", "domain": None})
    assert example == Example(id=0, prompt="1+1?", answer="2")


def test_lines_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n \n{"a": 2}\n')
    section = DataSection(source=f"jsonl:{tmp_path / 'a.jsonl'}")
    assert [row_label(section, index).rpartition(":")[2] for index in (0, 1)] == ["2", "4"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.jsonl"):
        load(f"jsonl:{tmp_path}/nowhere.jsonl")


@pytest.mark.parametrize("source", ["rows.jsonl", "csv:rows", "jsonl:", "task"])
def test_unknown_sources(source: str) -> None:
    with pytest.raises(ValueError, match="needs tfds:NAME, jsonl:PATH, hf:NAME or task:NAME"):
        load(source)


def test_task_source_is_lazy_sliceable_and_limited() -> None:
    examples = load("task:running_total", limit=1_000_000_000)
    assert len(examples) == 1_000_000_000 and examples[999_999_999].id == 999_999_999
    assert [e.id for e in examples[10:13]] == [10, 11, 12]
    assert len(load("task:running_total")) == 100_000
    with pytest.raises(IndexError):
        load("task:running_total", limit=5)[5]
    prompts, _ = encode_prompts(
        load("task:running_total", limit=5),
        DataSection.model_validate({"source": "task:running_total", "template": "plain"}),
        load_tokenizer("characters:running_total"),
    )
    assert [p.id for p in prompts] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "task:sums"}, "no task 'sums'; known: bilingual, running_total"),
        ({"split": "test"}, "split: a task has train and held_out"),
        ({"options": {"terms": 3}}, "options.terms: no option"),
        ({"held_out_fraction": 0.1}, "held_out_fraction: has no effect on a task"),
        ({"fields": {"prompt": "q"}}, "fields: has no effect"),
    ],
)
def test_task_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(**{"source": "task:running_total", **settings})


def test_hub_source_without_its_package_names_the_remedy(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'r1jax[hf]'")):
        load("hf:openai/gsm8k")


class HubRows:
    """What a split of `datasets` offers: length and rows by index."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert isinstance(index, int)
        self.reads += 1
        return self.rows[index]


def test_hub_rows_are_mapped_like_any_others(monkeypatch) -> None:
    calls, rows = [], HubRows(GSM8K)
    module = ModuleType("datasets")

    def load_dataset(name: str, config: str | None = None, **settings: Any) -> HubRows:
        calls.append((name, config, settings["split"], settings["revision"]))
        if settings["split"] == "nope":
            raise ValueError("Unknown split")
        return rows

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    options = {"config": "main", "revision": "abc"}
    examples = load("hf:openai/gsm8k", split="test", options=options, **GSM8K_SETTINGS)
    assert rows.reads == 1, "only the first row is read to check the mapping"
    assert [e.answer for e in examples] == ["72", "3,600", "-5.5"]
    load(
        "hf:openai/gsm8k",
        held_out_fraction=0.01,
        options={**options, "from_split": "validation"},
        **GSM8K_SETTINGS,
    )
    assert calls == [
        ("openai/gsm8k", "main", "test", "abc"),
        ("openai/gsm8k", "main", "validation", "abc"),
    ]
    with pytest.raises(ValueError, match=r"source: split = 'nope': Unknown split"):
        load("hf:openai/gsm8k", split="nope")


def test_bytes_and_numpy_scalars_become_text(monkeypatch) -> None:
    """As TFDS gives them."""
    rows = HubRows([{"prompt": "zwölf".encode(), "answer": np.int64(12)}])
    module = ModuleType("datasets")
    module.load_dataset = lambda *args, **settings: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert load("hf:any/thing")[0] == Example(id=0, prompt="zwölf", answer="12")
