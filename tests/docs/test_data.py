"""What docs/data.md says about rows, tokens and paths is what the readers do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml
from tiny_checkpoint import make_model
from transformers import AutoTokenizer

from r1jax.data.conversations import encode_conversations
from r1jax.data.documents import encode_documents
from r1jax.data.examples import load_examples
from r1jax.data.preferences import load_preferences
from r1jax.data.prompts import encode_prompt
from r1jax.data.step_labels import load_step_labels
from r1jax.settings.data import DataSection
from r1jax.settings.kinds import KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
# (kinds, the row, what is set also) of each row of the first table.
ROWS = [
    (re.findall(r"`(\w+)`", kinds), row, more)
    for kinds, row, more in re.findall(r"^\| (`.*?) \| `(\{.*?\})` \| (.*?) ?\|$", PAGE, re.M)
]


def section(folder: Path, row: str, more: str = "") -> DataSection:
    (folder / "rows.jsonl").write_text(row + "\n")
    settings = {"source": f"jsonl:{folder}/rows.jsonl", "template": "plain"}
    found = re.search(r"`(fields: .*)`", more)
    return DataSection(**settings | (yaml.safe_load(found[1]) if found else {}))


def test_every_kind_of_stage_has_a_row() -> None:
    assert len(ROWS) == 8
    assert {kind for kinds, _, _ in ROWS for kind in kinds} == set(KINDS)


READERS: Mapping[str, Callable[[DataSection, str], object]] = {
    "reward_model": lambda data, more: load_preferences(data, labelled="pointwise" in more)[0],
    "process_reward_model": lambda data, _: load_step_labels(data, neutral=None)[0],
}


@pytest.mark.parametrize(("kinds", "row", "more"), ROWS)
def test_a_row_is_read(kinds: list[str], row: str, more: str, tmp_path: Path) -> None:
    data = section(tmp_path, row, more)
    for kind in kinds:
        read = READERS.get(kind, lambda data, _: load_examples(data)[0])(data, more)
        for field, value in json.loads(row).items():
            if field in ("prompt", "answer", "text", "response", "safe"):
                held = getattr(read, field, None)
                assert held == value or value in getattr(read, "responses", ())


def test_the_text_of_pretraining_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'prompt'"):
        load_examples(section(tmp_path, ROWS[0][1]))


def test_where_an_end_of_text_is_added(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    eos = tokenizer.eos_token_id
    by_kind = {kinds[0]: section(tmp_path, row, more) for kinds, row, more in ROWS[:1]}
    (text,) = encode_documents(load_examples(by_kind["pretrain"]), tokenizer)
    assert text.tokens[-1] == eos and text.trained[-1]
    data = section(tmp_path, ROWS[1][1])
    (talk,) = encode_conversations(
        load_examples(data), section=data, tokenizer=tokenizer, stop_ids=[eos]
    )
    assert talk.tokens[-1] == eos and talk.trained[-1] and list(talk.tokens).count(eos) == 1
    data = section(tmp_path, ROWS[3][1])
    assert eos not in encode_prompt(load_examples(data)[0], data, tokenizer).token_ids


def test_paths_of_rows_start_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section(tmp_path, ROWS[3][1])
    monkeypatch.chdir(tmp_path)
    assert len(load_examples(DataSection(source="jsonl:rows.jsonl"))) == 1
