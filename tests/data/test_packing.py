"""Packed rows: nothing lost, nothing cut, nothing mixed, and resumable anywhere."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from r1jax.data.documents import Document, encode_documents
from r1jax.data.example import Example
from r1jax.data.packing import PackedRows, best_fit_decreasing, packed_once
from r1jax.data.tokenizers import load_tokenizer

EOS = 1


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("characters:running_total")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Several windows per epoch, the last one smaller."""
    monkeypatch.setattr("r1jax.data.packing._WINDOW", 8)


def documents(count: int, longest: int = 12) -> list[Example]:
    # Distinct texts of distinct lengths: number i in front, then filler.
    return [
        Example(id=i, prompt="", answer="", text=f"{i}=" + "-" * (i * 7 % (longest - 3)))
        for i in range(count)
    ]


def packed(examples: Sequence[Example], tokenizer, **settings: Any) -> PackedRows[Example]:
    return PackedRows(
        examples, partial(encode_documents, tokenizer=tokenizer), tokenizer, **settings
    )


def once(examples: Sequence[Example], tokenizer, **settings: Any) -> list[dict[str, np.ndarray]]:
    encode = partial(encode_documents, tokenizer=tokenizer)
    return list(packed_once(examples, encode, tokenizer, **settings))


def segments(batch: dict[str, np.ndarray]) -> list[tuple[int, ...]]:
    """The documents of a batch, read back through the segment ids alone."""
    found = []
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, ids.max() + 1):
            found.append(tuple(tokens[ids == segment].tolist()))
    return found


def one_epoch(rows: PackedRows) -> list[tuple[int, ...]]:
    epoch, found = rows.epoch, []
    while rows.epoch == epoch:
        found += segments(rows.take(1))
    return found


def test_an_epoch_holds_every_document_once_whole_and_ended(tokenizer) -> None:
    examples = documents(37)
    rows = packed(examples, tokenizer, row_tokens=16, seed=0)
    expected = [(*tokenizer(e.text)["input_ids"], EOS) for e in examples]
    first, second = one_epoch(rows), one_epoch(rows)
    assert sorted(first) == sorted(second) == sorted(expected)
    # Other documents meet in the first window, not just the same ones in another order.
    assert set(first[:8]) != set(second[:8])
    assert rows.dropped == 0


def test_layout_of_rows(tokenizer) -> None:
    batch = packed(documents(37), tokenizer, row_tokens=24, seed=0).take(6)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((6, 24), np.int32),
        "segment_ids": ((6, 24), np.int32),
        "positions": ((6, 24), np.int32),
        "trained": ((6, 24), np.bool_),
    }
    for tokens, ids, positions, trained in zip(*batch.values(), strict=True):
        used = int((ids > 0).sum())
        assert (ids[used:] == 0).all() and (positions[used:] == 0).all()
        assert trained.tolist() == [i > 0 and p > 0 for i, p in zip(ids, positions, strict=True)]
        assert (tokens[used:] == tokenizer.pad_token_id).all()
        assert set(np.diff(ids[:used])) <= {0, 1} and ids[0] == 1
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            assert tokens[inside][-1] == EOS and EOS not in tokens[inside][:-1]


def test_hand_worked_row(tokenizer) -> None:
    example = [Example(id=0, prompt="", answer="", text="1+1=2")]
    batch = packed(example, tokenizer, row_tokens=8, seed=0).take(1)
    ids = tokenizer.convert_tokens_to_ids(["1", "+", "1", "=", "2", "<eos>", "<pad>", "<pad>"])
    assert batch["tokens"].tolist() == [ids]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]
    assert batch["trained"].tolist() == [[False] + [True] * 5 + [False] * 2]


def test_bos_and_eos_are_never_doubled(tokenizer) -> None:
    declared = load_tokenizer("characters:running_total")
    declared.bos_token = "<pad>"
    declared.add_bos_token = True
    texts = ["1+1=2", "<pad>1+1=2", "1+1=2<eos>", "<pad>1+1=2<eos>"]
    examples = [Example(id=i, prompt="", answer="", text=text) for i, text in enumerate(texts)]
    found = one_epoch(packed(examples, declared, row_tokens=8, seed=0))
    assert found == [(0, *tokenizer("1+1=2")["input_ids"], EOS)] * 4


def test_documents_longer_than_a_row_are_counted_and_left_out(tokenizer) -> None:
    examples = documents(20, longest=12)
    lengths = [len(tokenizer(e.text)["input_ids"]) + 1 for e in examples]
    rows = packed(examples, tokenizer, row_tokens=8, seed=0)
    found = one_epoch(rows)
    fitting = sum(length <= 8 for length in lengths)
    assert 0 < fitting < 20 and len(found) == fitting
    state, at_epoch_end = rows.state(), 20 - fitting
    assert state["dropped"] == at_epoch_end
    resumed = packed(examples, tokenizer, row_tokens=8, seed=0)
    resumed.restore(state)
    assert resumed.dropped == rows.dropped
    one_epoch(rows)
    assert rows.state()["dropped"] == 2 * at_epoch_end


def test_rows_too_short_for_every_document_are_an_error_not_a_hang(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"none of the 20 documents fits into row_tokens = 2"):
        packed(documents(20), tokenizer, row_tokens=2, seed=0).take(1)


@pytest.mark.parametrize("before", [0, 1, 3, 7, 12])
def test_restored_state_continues_exactly(tokenizer, before: int) -> None:
    examples = documents(37)
    rows = packed(examples, tokenizer, row_tokens=16, seed=5)
    for _ in range(before):
        rows.take(4)
    state = json.loads(json.dumps(rows.state()))
    expected = [rows.take(4) for _ in range(10)]
    resumed = packed(examples, tokenizer, row_tokens=16, seed=5)
    resumed.take(8)
    resumed.restore(state)
    for batch in expected:
        again = resumed.take(4)
        for name in batch:
            np.testing.assert_array_equal(again[name], batch[name])
    assert resumed.state() == rows.state()


def test_before_covers_windows_and_epochs(tokenizer) -> None:
    """The parametrisation above would prove little if it never left the first window."""
    rows = packed(documents(37), tokenizer, row_tokens=16, seed=5)
    seen = []
    for take in range(13):
        if take in (0, 1, 3, 7, 12):
            seen.append(rows.state())
        rows.take(4)
    assert {s["epoch"] for s in seen} >= {0, 1}
    assert any(s["window"] > 0 and s["position"] > 0 for s in seen)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_slices_of_all_processes_are_the_single_process_order(tokenizer, processes) -> None:
    examples = documents(37)
    alone = packed(examples, tokenizer, row_tokens=16, seed=0)
    shards = [
        packed(examples, tokenizer, row_tokens=16, seed=0, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for _ in range(8):
        whole, parts = alone.take(4), [shard.take(4) for shard in shards]
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])
    with pytest.raises(ValueError, match="cannot take 3 items"):
        shards[0].take(3)


def test_a_state_of_other_data_is_refused(tokenizer) -> None:
    examples = documents(37)
    state = packed(examples, tokenizer, row_tokens=16, seed=0).state()
    changed = [*examples]
    changed[0] = Example(id=0, prompt="", answer="", text="9")
    for other, row_tokens in ((changed, 16), (examples[:-1], 16), (examples, 17)):
        with pytest.raises(ValueError, match="has changed"):
            packed(other, tokenizer, row_tokens=row_tokens, seed=0).restore(state)
    with pytest.raises(ValueError, match="seed 0, this run has 1"):
        packed(examples, tokenizer, row_tokens=16, seed=1).restore(state)


class Counting(list):
    """Examples that count how often they are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_documents_are_read_when_needed(tokenizer) -> None:
    examples = Counting(documents(10) * 100)
    rows = packed(examples, tokenizer, row_tokens=16, seed=0)
    assert examples.reads <= 64 + 8  # Fingerprint and the first window.
    state, examples.reads = rows.state(), 0
    rows.restore(state)
    assert examples.reads == 8


def test_missing_text_and_missing_documents_are_errors(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"row 0 has no text to train on; name its column"):
        packed([Example(0, "1", "1")], tokenizer, row_tokens=16, seed=0)
    for pack in (packed, once):
        settings = {"seed": 0} if pack is packed else {"rows_per_batch": 1}
        with pytest.raises(ValueError, match="at least one document"):
            pack([], tokenizer, row_tokens=16, **settings)
    endless = load_tokenizer("characters:running_total")
    endless.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        packed(documents(1), endless, row_tokens=16, seed=0)


def flagged(numbers: Sequence[int]) -> list[Document]:
    """Document i: 5 tokens, all i, trained where the bits of i say so."""
    return [
        Document(np.full(5, i, np.int32), np.array([False] + [bool(i >> b & 1) for b in range(4)]))
        for i in numbers
    ]


def test_flags_stay_with_their_tokens(tokenizer) -> None:
    rows = PackedRows(range(16), flagged, tokenizer, row_tokens=13, seed=0)
    seen = set()
    while rows.epoch == 0:
        (tokens,), (ids,), _, (trained,) = rows.take(1).values()
        assert not trained[ids == 0].any()
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            (document,) = flagged([tokens[inside][0]])
            assert trained[inside].tolist() == document.trained.tolist()
            seen.add(int(tokens[inside][0]))
    assert seen == set(range(16))


def test_a_state_of_other_targets_is_refused(tokenizer) -> None:
    def more(numbers: Sequence[int]) -> list[Document]:
        return [Document(d.tokens, np.arange(5) > 0) for d in flagged(numbers)]

    state = PackedRows(range(16), flagged, tokenizer, row_tokens=13, seed=0).state()
    with pytest.raises(ValueError, match="has changed"):
        PackedRows(range(16), more, tokenizer, row_tokens=13, seed=0).restore(state)


def test_documents_whose_flags_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens \(3,\) and trained \(2,\)"):
        Document(np.zeros(3, np.int32), np.zeros(2, np.bool_))
    with pytest.raises(ValueError, match="first token of a document follows nothing"):
        Document(np.zeros(2, np.int32), np.ones(2, np.bool_))
    assert not Document(np.zeros(0, np.int32), np.zeros(0, np.bool_)).trained.any()


@pytest.mark.parametrize("row_tokens", [8, 16])
def test_rows_per_epoch_counts_the_first_epoch_and_moves_nothing(tokenizer, row_tokens) -> None:
    examples = documents(37)
    rows = packed(examples, tokenizer, row_tokens=row_tokens, seed=3)
    count = 0
    while rows.epoch == 0:
        rows.take(1)
        count += 1
    rows.take(2)
    state, dropped = rows.state(), rows.dropped
    assert rows.rows_per_epoch() == count
    assert (rows.state(), rows.dropped) == (state, dropped)
    again = packed(examples, tokenizer, row_tokens=row_tokens, seed=3)
    again.restore(state)
    np.testing.assert_array_equal(again.take(4)["tokens"], rows.take(4)["tokens"])
    with pytest.raises(ValueError, match=r"none of the 37 documents fits into row_tokens = 2"):
        packed(examples, tokenizer, row_tokens=2, seed=0).rows_per_epoch()


@pytest.mark.parametrize("rows_per_batch", [1, 4, 64])
def test_one_pass_holds_every_document_once_in_order(tokenizer, rows_per_batch: int) -> None:
    examples = documents(37)
    expected = [(*tokenizer(e.text)["input_ids"], EOS) for e in examples]
    batches = once(examples, tokenizer, row_tokens=16, rows_per_batch=rows_per_batch)
    assert all(array.shape == (rows_per_batch, 16) for b in batches for array in b.values())
    found = [document for batch in batches for document in segments(batch)]
    assert sorted(found) == sorted(expected)
    # Windows come in the order of the documents; within one, packing decides.
    for start in range(0, 37, 8):
        assert sorted(found[start : start + 8]) == sorted(expected[start : start + 8])
    # Only the last batch may have empty rows, at its end, and they are nothing to a loss.
    used = np.concatenate([(batch["segment_ids"] > 0).any(axis=1) for batch in batches])
    assert used[: used.sum()].all() and len(used) - used.sum() < rows_per_batch
    assert sum(b["trained"].sum() for b in batches) == sum(len(d) - 1 for d in expected)
    empty = ~(batches[-1]["segment_ids"] > 0).any(axis=1)
    assert not any(batches[-1][k][empty].any() for k in ("positions", "trained"))


def test_one_pass_is_shared_out_with_equal_batches_on_every_process(tokenizer) -> None:
    examples = documents(37)
    settings = {"row_tokens": 16, "rows_per_batch": 6}
    whole = once(examples, tokenizer, **settings)
    shards = [
        once(examples, tokenizer, **settings, process_index=p, process_count=3) for p in range(3)
    ]
    assert not (whole[-1]["segment_ids"][-2:]).any(), "the last process has only empty rows"
    for batch, *parts in zip(whole, *shards, strict=True):
        for name in batch:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), batch[name])
    encode = partial(encode_documents, tokenizer=tokenizer)
    # The mistake is told before the first batch is asked for.
    with pytest.raises(ValueError, match="cannot take 4 items"):
        packed_once(examples, encode, tokenizer, row_tokens=16, rows_per_batch=4, process_count=3)
    with pytest.raises(ValueError, match=r"none of the 37 documents fits into row_tokens = 2"):
        once(examples, tokenizer, row_tokens=2, rows_per_batch=1)


def test_one_pass_leaves_out_what_does_not_fit(tokenizer) -> None:
    examples = documents(20, longest=12)
    fitting = sum(len(tokenizer(e.text)["input_ids"]) + 1 <= 8 for e in examples)
    batches = once(examples, tokenizer, row_tokens=8, rows_per_batch=3)
    assert sum(int(b["segment_ids"].max(axis=1).sum()) for b in batches) == fitting < 20


def testbest_fit_decreasing_by_hand() -> None:
    # 7 and 5 open bins with 3 and 5 free; 4 fits the second only, 3 fills the first, 2 opens a
    # third, and 1 goes where it leaves least: it fills the second.
    assert best_fit_decreasing([4, 7, 1, 5, 3, 2], 10) == [[1, 4], [3, 0, 2], [5]]
    # 12 leaves 8, 9 + 9 leave 2: first-fit would put the 2 with the 12.
    assert best_fit_decreasing([12, 9, 9, 2], 20) == [[0], [1, 2, 3]]
    assert best_fit_decreasing([], 10) == []


def test_packing_is_tight_and_valid_on_random_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 2000).tolist()
    bins = best_fit_decreasing(lengths, 128)
    assert sorted(i for items in bins for i in items) == list(range(2000))
    assert all(sum(lengths[i] for i in items) <= 128 for items in bins)
    assert len(bins) <= 1.01 * sum(lengths) / 128 + 1
