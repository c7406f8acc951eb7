"""Rows that are padded: their arrays, their order, and where a stream of them goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from random_preferences import random_rows

from r1jax.data.padded_rows import PaddedRows, pad_texts, padded_once
from r1jax.data.preferences import EncodedPreference, preference_arrays


def test_padded_rows_by_hand() -> None:
    arrays = pad_texts([np.asarray([5, 6, 7]), np.asarray([0])], row_tokens=4)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "tokens": [[5, 6, 7, 0], [0, 0, 0, 0]],
        "positions": [[0, 1, 2, 0], [0, 0, 0, 0]],
        "segment_ids": [[1, 1, 1, 0], [1, 0, 0, 0]],
        "ends": [2, 0],
    }
    assert all(array.dtype == np.int32 for array in arrays.values())
    with pytest.raises(ValueError, match="a text of 3 tokens does not fit into 2"):
        pad_texts([np.arange(3)], row_tokens=2)


def ids(arrays: dict[str, np.ndarray]) -> list[int]:
    return arrays["tokens"][:, 0, 0].tolist()


def test_an_epoch_visits_every_pair_once_and_a_restart_goes_on_exactly() -> None:
    rows = random_rows(10)
    stream = PaddedRows(rows, preference_arrays, seed=3, length_bucket=4)
    order = []
    for _ in range(5):
        arrays = stream.take(4)
        order += ids(arrays)
        longest = int(arrays["ends"].max()) + 1
        assert arrays["tokens"].shape[-1] == -(-longest // 4) * 4
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]

    stream = PaddedRows(rows, preference_arrays, seed=3, length_bucket=4)
    stream.take(6)
    state = json.loads(json.dumps(stream.state()))
    shards = [
        PaddedRows(
            rows, preference_arrays, seed=3, length_bucket=4, process_index=p, process_count=2
        )
        for p in range(2)
    ]
    for shard in shards:
        shard.take(2)  # Wherever it was before: restoring must forget that.
        shard.restore(state)
    for start in (6, 10, 14):
        parts = [shard.take(4) for shard in shards]
        assert [i for part in parts for i in ids(part)] == order[start : start + 4]
        assert len({part["tokens"].shape for part in parts}) == 1  # processes agree on shapes


@pytest.mark.parametrize("safe", [None, True])
def test_a_state_of_other_rows_is_refused(safe: bool | None) -> None:
    rows = random_rows(6, safe)
    state = PaddedRows(rows, preference_arrays, seed=1, length_bucket=8).state()
    changed = rows[2].texts[-1].copy()
    changed[-1] += 1
    others = [
        rows[:-1],
        rows[::-1],
        [EncodedPreference(7, rows[0].texts, rows[0].safe), *rows[1:]],
        [*rows[:2], EncodedPreference(2, (*rows[2].texts[:-1], changed), rows[2].safe), *rows[3:]],
    ]
    if safe:
        others.append([EncodedPreference(r.id, r.texts, not r.safe) for r in rows])
    for other in others:
        with pytest.raises(ValueError, match="has changed"):
            PaddedRows(other, preference_arrays, seed=1, length_bucket=8).restore(state)
    with pytest.raises(ValueError, match="seed 1, this run has 2"):
        PaddedRows(rows, preference_arrays, seed=2, length_bucket=8).restore(state)
    with pytest.raises(ValueError, match="at least one row"):
        PaddedRows(list[EncodedPreference](), preference_arrays, seed=1, length_bucket=8)


def test_each_row_is_there_once_in_batches_of_one_shape() -> None:
    rows = random_rows(10)
    halves = [
        list(
            padded_once(
                rows,
                preference_arrays,
                rows_per_batch=4,
                length_bucket=8,
                process_index=index,
                process_count=2,
            )
        )
        for index in range(2)
    ]
    seen = []
    for parts in zip(*halves, strict=True):
        for arrays, real in parts:
            assert arrays["tokens"].shape == (2, 2, 16)
            seen += [i for i, weight in zip(ids(arrays), real, strict=True) if weight]
    assert seen == list(range(10))
    assert [real.sum() for real in (half[-1][1] for half in halves)] == [2, 0]
