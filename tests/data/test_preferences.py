"""Preference rows: what is refused, what is dropped and counted, and exactly what is scored."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_preferences import random_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1jax.data.preferences import (
    Preference,
    encode_preferences,
    encode_responses,
    load_preferences,
    preference_arrays,
    scored_text,
)
from r1jax.settings.data import DataSection

PAIR = {"prompt": "How?", "chosen": "<think>a</think>Well.", "rejected": "No."}
LABELLED = {"prompt": "How?", "response": "So.", "safe": True}
R1_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<think>\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and a template that opens the thought, as R1's does."""
    tokens = ["<bos>", "<eos>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=""))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<bos>", "<eos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=R1_TURNS,
        clean_up_tokenization_spaces=False,
    )


def section(source: str = "jsonl:rows.jsonl", **settings: Any) -> DataSection:
    return DataSection.model_validate({"source": source, **settings})


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


# Rows


def test_rows_are_read_by_config_alone(tmp_path: Path) -> None:
    rows = [{**PAIR, "margin": 2.5}, {**PAIR, "rejected": 7}]
    assert load_preferences(section(write(tmp_path / "p.jsonl", rows)), labelled=False) == [
        Preference(0, "How?", ("<think>a</think>Well.", "No.")),
        Preference(1, "How?", ("<think>a</think>Well.", "7")),
    ]
    rows = [{"q": "a", "r": "b", "ok": ok} for ok in (True, False, 1, 0)]
    fields = {"prompt": "q", "response": "r", "safe": "ok"}
    labelled = load_preferences(
        section(write(tmp_path / "s.jsonl", rows), fields=fields), labelled=True
    )
    assert labelled[1] == Preference(1, "a", ("b",), False)
    assert [row.safe for row in labelled] == [True, False, True, False]


def test_one_prompt_falls_on_one_side_of_the_split(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"q{i % 50}", "rejected": f"r{i}"} for i in range(200)]
    source = write(tmp_path / "p.jsonl", rows)
    train, held_out = (
        load_preferences(section(source, split=split, held_out_fraction=0.3), labelled=False)
        for split in ("train", "held_out")
    )
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert {row.id for row in train} | {row.id for row in held_out} == set(range(200))
    assert len(train) > len(held_out) > 20
    limited = load_preferences(
        section(source, split="held_out", held_out_fraction=0.3, limit=5), labelled=False
    )
    assert limited == list(held_out[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": None}, "rows.jsonl:2: column 'rejected' (for rejected) is null; the row has"),
        (
            {"chosen": ...},
            "rows.jsonl:2: column 'chosen' (for chosen) does not exist; the row has ",
        ),
        ({"chosen": ...}, "prompt, rejected. Map it with fields: {chosen: COLUMN}."),
        ({"chosen": " \n"}, "rows.jsonl:2: column 'chosen' (for chosen) is empty; fill it or rem"),
        ({"prompt": ""}, "rows.jsonl:2: column 'prompt' (for prompt) is empty"),
        ({"chosen": ["a"]}, "column 'chosen' is a list; needs t"),
        ({"chosen": [{"role": "user", "content": "a"}]}, "ends with a message of the user, not"),
    ],
)
def test_a_pair_without_both_sides_is_an_error_that_names_the_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    bad = {key: value for key, value in {**PAIR, **change}.items() if value is not ...}
    source = write(tmp_path / "rows.jsonl", [PAIR, bad])
    with pytest.raises(ValueError, match=re.escape(message)):
        load_preferences(section(source), labelled=False)


def test_sides_that_are_conversations_and_nested_columns(tmp_path: Path) -> None:
    user, good = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
    row = {"q": [user], "pair": {"chosen": [user, good], "rejected": "3"}}
    fields = {"prompt": "q", "chosen": "pair.chosen", "rejected": "pair.rejected"}
    source = write(tmp_path / "rows.jsonl", [row])
    (loaded,) = load_preferences(section(source, fields=fields), labelled=False)
    assert (loaded.prompt, loaded.responses) == ("1+1?", ("2", "3"))
    other = {**row, "q": "2+2?"}
    with pytest.raises(ValueError, match="fields.chosen: .*answers another message than the pro"):
        load_preferences(
            section(write(tmp_path / "b.jsonl", [other]), fields=fields), labelled=False
        )


@pytest.mark.parametrize("label", ["false", "safe", 2, 0.5, [True], None])
def test_a_label_is_true_or_false_and_nothing_else(label: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [LABELLED, {**LABELLED, "safe": label}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: column 'safe' \(for safe\)"):
        load_preferences(section(source), labelled=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "task:running_total"}, "the task RunningTotal has no preferences; use"),
        ({"source": "task:bilingual"}, "options.subject = 'maths': only general has pairs"),
        ({"source": "rows.jsonl"}, "needs tfds:NAME, jsonl:PATH"),
        ({"answer_pattern": "(.)"}, "answer_pattern: has no effect on preferences"),
        ({"fields": {"choosen": "a"}}, "fields.choosen: did you mean 'chosen'? known: prompt, cho"),
    ],
)
def test_config_mistakes(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = {"source": write(tmp_path / "rows.jsonl", [PAIR]), **settings}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_preferences(section(**settings), labelled=False)


# What is scored


@pytest.mark.parametrize(
    ("response", "summary"),
    [
        ("<think>\n1+1\n</think>\n\nIt is 2.\n", "It is 2."),
        ("1+1\n</think> It is 2.", "It is 2."),  # the template opened the thought
        ("<think>a</think>b<think>c</think>d", "d"),
        ("No thought at all.", "No thought at all."),
        ("<think>never closed", None),
        ("<think>a</think>b<think>c", None),
        ("<think>a</think>\n", None),
    ],
)
def test_a_summary_is_what_follows_the_thought(response: str, summary: str | None) -> None:
    assert scored_text(response, "summary") == summary
    assert scored_text(response, "response") == response


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ("summary", "<bos>[user]1+1?[assistant]2<eos>"),
        ("response", "<bos>[user]1+1?[assistant]<think>\na</think>\n2<eos>"),
    ],
)
@pytest.mark.parametrize("end", ["", "<eos>"])
def test_a_text_is_the_prompt_what_is_read_and_one_eos(
    reads: Any, expected: str, end: str, tokenizer
) -> None:
    # The template prefills `<think>`, and the response has it, too: it must be there once.
    response = f"<think>\na</think>\n2{end}"
    (ids,) = encode_responses(["1+1?"], [response], section(), tokenizer, reads=reads)
    assert ids is not None and ids.dtype == np.int32
    assert tokenizer.decode(ids) == expected


def test_each_response_gets_its_own_prompt(tokenizer) -> None:
    prompts, responses = ["a", "b", "a", "b"], ["1", "<think>", "2", "3"]
    plain = section(template="plain", prompt_suffix="!")
    texts = encode_responses(prompts, responses, plain, tokenizer, reads="summary")
    decoded = [None if ids is None else tokenizer.decode(ids) for ids in texts]
    assert decoded == ["a!1<eos>", None, "a!2<eos>", "b!3<eos>"]
    with pytest.raises(ValueError, match="template: did you mean 'plain'"):
        encode_responses(["a"], ["b"], section(template="plane"), tokenizer, reads="summary")


def test_prompt_and_response_are_encoded_apart() -> None:
    # Together "ab" is one token; the policy reads "a" and writes "b".
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<eos>": 3}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    (ids,) = encode_responses(["a"], ["b"], section(template="plain"), merging, reads="summary")
    assert ids is not None and ids.tolist() == [0, 1, 3]
    silent = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(ValueError, match="no EOS token"):
        encode_responses(["a"], ["b"], section(template="plain"), silent, reads="summary")


def encode(rows: Any, tokenizer: Any, **settings: Any) -> Any:
    options = {"reads": "summary", "max_tokens": 100, **settings}
    return encode_preferences(rows, section(template="plain"), tokenizer, **options)


def test_rows_that_teach_nothing_are_dropped_and_each_is_counted_once(
    tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1jax.data.preferences._BATCH", 2)
    sides = [
        ("good", "bad"),
        ("<think>a</think>same", "same"),  # differ in what is not read
        ("<think>endless" + 30 * "x", "bad"),
        ("good", "12345678"),
        ("123456789", "bad"),  # one token too many, with the prompt's one and EOS
        ("123456789", "123456789"),
        ("fine", "<think>a</think> "),
        ("better", "worse"),
    ]
    pairs = [Preference(10 + i, "q", pair) for i, pair in enumerate(sides)]
    kept, report = encode(pairs, tokenizer, max_tokens=10)
    assert [pair.id for pair in kept] == [10, 13, 17]
    assert [tokenizer.decode(text) for text in kept[0].texts] == ["qgood<eos>", "qbad<eos>"]
    assert report == (
        "3 of 8 preference rows, the longest text has 11 tokens; dropped: 2 without a summary "
        "after the thought, 2 too long, 1 with equal sides"
    )
    # Nothing is too long for its thought where the thought is not read, or equal where it is.
    whole, report = encode(pairs[1:3], tokenizer, reads="response")
    assert len(whole) == 2 and f"has {len('q<think>endless') + 31} tokens" in report


def test_labelled_responses_are_encoded_with_their_label(tokenizer) -> None:
    rows = [
        Preference(0, "q", ("<think>",), True),
        Preference(1, "q", ("<think>bomb</think>No.",), False),
    ]
    kept, report = encode(rows, tokenizer, reads="response")
    assert [(row.id, row.safe, tokenizer.decode(row.texts[0])) for row in kept] == [
        (0, True, "q<think><eos>"),
        (1, False, "q<think>bomb</think>No.<eos>"),
    ]
    assert report.startswith("2 of 2 ") and "dropped" not in report


def test_nothing_left_is_an_error_with_the_count_of_each_reason(tokenizer) -> None:
    pairs = [Preference(0, "q", ("a", "a")), Preference(1, "q", ("longer", "b"))]
    message = r"nothing is left .* max_tokens = 4 .* 1 too long, 1 with equal sides"
    with pytest.raises(ValueError, match=message):
        encode(pairs, tokenizer, max_tokens=4)


# Arrays


def test_a_pair_is_two_rows_and_a_label_a_number() -> None:
    pairs = random_rows(3)
    arrays = preference_arrays(pairs, 16)
    assert {name: array.shape for name, array in arrays.items()} == {
        "tokens": (3, 2, 16),
        "positions": (3, 2, 16),
        "segment_ids": (3, 2, 16),
        "ends": (3, 2),
    }
    for i, pair in enumerate(pairs):
        for side, text in enumerate(pair.texts):
            end = arrays["ends"][i, side] + 1
            np.testing.assert_array_equal(arrays["tokens"][i, side, :end], text)
            assert arrays["segment_ids"][i, side].sum() == len(text)
    labelled = preference_arrays(random_rows(3, safe=True), 16)
    assert labelled["tokens"].shape == (3, 16) and labelled["ends"].shape == (3,)
    assert labelled["safe"].dtype == np.float32 and labelled["safe"].tolist() == [1, 0, 1]
