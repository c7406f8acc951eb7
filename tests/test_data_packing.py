"""Packed rows: nothing lost, nothing cut, nothing mixed, and resumable anywhere."""

import json

import numpy as np
import pytest

from r1jax.data import Example, PackedRows, load_tokenizer
from r1jax.data.packing import best_fit_decreasing

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
    rows = PackedRows(examples, tokenizer, row_tokens=16, seed=0)
    expected = [(*tokenizer(e.text)["input_ids"], EOS) for e in examples]
    first, second = one_epoch(rows), one_epoch(rows)
    assert sorted(first) == sorted(second) == sorted(expected)
    # Other documents meet in the first window, not just the same ones in another order.
    assert set(first[:8]) != set(second[:8])
    assert rows.dropped == 0


def test_layout_of_rows(tokenizer) -> None:
    batch = PackedRows(documents(37), tokenizer, row_tokens=24, seed=0).take(6)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: ((6, 24), np.int32) for k in ("tokens", "segment_ids", "positions")
    }
    for tokens, ids, positions in zip(*batch.values(), strict=True):
        used = int((ids > 0).sum())
        assert (ids[used:] == 0).all() and (positions[used:] == 0).all()
        assert (tokens[used:] == tokenizer.pad_token_id).all()
        assert set(np.diff(ids[:used])) <= {0, 1} and ids[0] == 1
        for segment in range(1, ids.max() + 1):
            inside = ids == segment
            assert positions[inside].tolist() == list(range(inside.sum()))
            assert tokens[inside][-1] == EOS and EOS not in tokens[inside][:-1]


def test_hand_worked_row(tokenizer) -> None:
    example = [Example(id=0, prompt="", answer="", text="1+1=2")]
    batch = PackedRows(example, tokenizer, row_tokens=8, seed=0).take(1)
    ids = tokenizer.convert_tokens_to_ids(["1", "+", "1", "=", "2", "<eos>", "<pad>", "<pad>"])
    assert batch["tokens"].tolist() == [ids]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]


def test_bos_and_eos_are_never_doubled(tokenizer) -> None:
    declared = load_tokenizer("characters:running_total")
    declared.bos_token = "<pad>"
    declared.add_bos_token = True
    texts = ["1+1=2", "<pad>1+1=2", "1+1=2<eos>", "<pad>1+1=2<eos>"]
    examples = [Example(id=i, prompt="", answer="", text=text) for i, text in enumerate(texts)]
    found = one_epoch(PackedRows(examples, declared, row_tokens=8, seed=0))
    assert found == [(0, *tokenizer("1+1=2")["input_ids"], EOS)] * 4


def test_documents_longer_than_a_row_are_counted_and_left_out(tokenizer) -> None:
    examples = documents(20, longest=12)
    lengths = [len(tokenizer(e.text)["input_ids"]) + 1 for e in examples]
    rows = PackedRows(examples, tokenizer, row_tokens=8, seed=0)
    found = one_epoch(rows)
    fitting = sum(length <= 8 for length in lengths)
    assert 0 < fitting < 20 and len(found) == fitting
    state, at_epoch_end = rows.state(), 20 - fitting
    assert state["dropped"] == at_epoch_end
    resumed = PackedRows(examples, tokenizer, row_tokens=8, seed=0)
    resumed.restore(state)
    assert resumed.dropped == rows.dropped
    one_epoch(rows)
    assert rows.state()["dropped"] == 2 * at_epoch_end


def test_rows_too_short_for_every_document_are_an_error_not_a_hang(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"none of the 20 documents fits into row_tokens = 2"):
        PackedRows(documents(20), tokenizer, row_tokens=2, seed=0).take(1)


@pytest.mark.parametrize("before", [0, 1, 3, 7, 12])
def test_restored_state_continues_exactly(tokenizer, before: int) -> None:
    examples = documents(37)
    rows = PackedRows(examples, tokenizer, row_tokens=16, seed=5)
    for _ in range(before):
        rows.take(4)
    state = json.loads(json.dumps(rows.state()))
    expected = [rows.take(4) for _ in range(10)]
    resumed = PackedRows(examples, tokenizer, row_tokens=16, seed=5)
    resumed.take(8)
    resumed.restore(state)
    for batch in expected:
        again = resumed.take(4)
        for name in batch:
            np.testing.assert_array_equal(again[name], batch[name])
    assert resumed.state() == rows.state()


def test_before_covers_windows_and_epochs(tokenizer) -> None:
    """The parametrisation above would prove little if it never left the first window."""
    rows = PackedRows(documents(37), tokenizer, row_tokens=16, seed=5)
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
    alone = PackedRows(examples, tokenizer, row_tokens=16, seed=0)
    shards = [
        PackedRows(
            examples, tokenizer, row_tokens=16, seed=0, process_index=p, process_count=processes
        )
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
    state = PackedRows(examples, tokenizer, row_tokens=16, seed=0).state()
    changed = [*examples]
    changed[0] = Example(id=0, prompt="", answer="", text="9")
    for other, row_tokens in ((changed, 16), (examples[:-1], 16), (examples, 17)):
        with pytest.raises(ValueError, match="has changed"):
            PackedRows(other, tokenizer, row_tokens=row_tokens, seed=0).restore(state)
    with pytest.raises(ValueError, match="seed 0, this run has 1"):
        PackedRows(examples, tokenizer, row_tokens=16, seed=1).restore(state)


class Counting(list):
    """Examples that count how often they are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_documents_are_read_when_needed(tokenizer) -> None:
    examples = Counting(documents(10) * 100)
    rows = PackedRows(examples, tokenizer, row_tokens=16, seed=0)
    assert examples.reads <= 64 + 8  # Fingerprint and the first window.
    state, examples.reads = rows.state(), 0
    rows.restore(state)
    assert examples.reads == 8


def test_missing_text_and_missing_documents_are_errors(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"row 0 has no text .* data.fields.text"):
        PackedRows([Example(0, "1", "1")], tokenizer, row_tokens=16, seed=0)
    with pytest.raises(ValueError, match="at least one document"):
        PackedRows([], tokenizer, row_tokens=16, seed=0)


def test_best_fit_decreasing_by_hand() -> None:
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
