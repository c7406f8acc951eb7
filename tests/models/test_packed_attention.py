"""Attention over packed rows on GPUs, beside attention by ids in float64.

The Pallas kernel runs in the interpreter. No test runs cuDNN: a stand-in in float64 sees flat
memory, lengths and offsets alone, as cuDNN's documentation has them; what no segment covers, it
leaves as NaN.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models import Execution, attention, cudnn_attention
from r1jax.models.attention import row_attention
from r1jax.models.cudnn_attention import check, find_segments, packed_attention, segments_a_row
from r1jax.models.flash_attention_gpu import flash_attention, ranges_of
from r1jax.sharding import single_device

# Padding in front, between and behind; a row of padding; a segment of one token; ids as they come.
IDS = np.asarray(
    [
        [0, 0, 0, 2, 2, 2, 2, 0, 0, 5, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0] * 16,
    ],
    np.int32,
)
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def arrays(ids: np.ndarray, value_dim: int = HEAD_DIM) -> list[np.ndarray]:
    """Queries, keys, values and cotangents, which are 0 at padding: nothing may depend on it."""
    rng = np.random.default_rng(0)
    sizes = (HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, value_dim), (HEADS, value_dim)
    made = [rng.normal(size=(*ids.shape, *size)).astype(np.float32) for size in sizes]
    made[3] *= (ids != 0)[..., None, None]
    return made


def of_one_segment(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray | None) -> Any:
    """Causal attention [time, heads, size] in float64, and its gradients, head by head."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    time, heads, size = q.shape
    group = heads // k.shape[1]
    out, grads = np.zeros((time, heads, v.shape[2])), [np.zeros_like(x) for x in (q, k, v)]
    for head in range(heads):
        key = head // group
        logits = q[:, head] @ k[:, key].T / math.sqrt(size)
        logits[np.triu_indices(time, 1)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, head] = weights @ v[:, key]
        if d_out is not None:
            d_weights = d_out[:, head] @ v[:, key].T
            d_logits = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))
            grads[0][:, head] = d_logits @ k[:, key] / math.sqrt(size)
            grads[1][:, key] += d_logits.T @ q[:, head] / math.sqrt(size)
            grads[2][:, key] += weights.T @ d_out[:, head]
    return out, grads


def expected_of(ids: np.ndarray, q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
    """Output and gradients by the ids alone; nothing at padding."""
    out = np.zeros((*ids.shape, HEADS, v.shape[3]))
    grads = [np.zeros(x.shape) for x in (q, k, v)]
    for row, segment in {(row, i) for (row, _), i in np.ndenumerate(ids) if i}:
        where = row, np.flatnonzero(ids[row] == segment)
        found = of_one_segment(*(x[where] for x in (q, k, v, d_out)))
        out[where] = found[0]
        for whole, part in zip(grads, found[1], strict=True):
            whole[where] = part
    return out, *grads


def at(x: np.ndarray, offset: int, length: int) -> np.ndarray:
    """The memory of `length` tokens from an offset on, in numbers."""
    numbers = math.prod(x.shape[2:])
    flat: np.ndarray = x.reshape(-1)[offset : offset + length * numbers]
    return flat.reshape(length, *x.shape[2:])


def as_cudnn(
    q: Any, k: Any, v: Any, lengths: Any, _: Any, q_offsets: Any, k_offsets: Any, d_out: Any = None
) -> tuple[np.ndarray, ...]:
    """Lengths and offsets are read one after the other, whatever rows they stand in."""
    q, k, v = (np.asarray(x) for x in (q, k, v))
    shape = (*q.shape[:3], v.shape[3])
    results = [np.full(s, np.nan, np.float32) for s in (shape, q.shape, k.shape, v.shape)]
    count = lengths.size
    triples = zip(np.ravel(lengths), np.ravel(q_offsets), np.ravel(k_offsets)[:count], strict=False)
    for length, queries, keys in (each for each in triples if each[0]):
        offsets = queries, keys, keys
        parts = [at(x, o, length) for x, o in zip((q, k, v), offsets, strict=True)]
        given = None if d_out is None else at(np.asarray(d_out), queries, length)
        out, grads = of_one_segment(*parts, given)
        for whole, part, o in zip(results, [out, *grads], (queries, *offsets), strict=True):
            at(whole, o, length)[...] = part
    return tuple(results)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(q: Any, k: Any, v: Any, segments: Any, *more: Any) -> tuple[jax.Array, ...]:
        shapes = [jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype), q, k, v]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
        read = cudnn_attention.operands(q, k, segments)
        found: tuple[jax.Array, ...] = jax.pure_callback(as_cudnn, shapes, q, k, v, *read, *more)
        return found

    def forward(q: Any, k: Any, v: Any, segments: Any, *, keep: bool) -> tuple[jax.Array, ...]:
        out, batch = call(q, k, v, segments)[0], segments.lengths.size
        statistics = jnp.full((batch, q.shape[2], q.shape[1]), 7.0)
        return (out, statistics) if keep else (out,)

    def backward(
        q: Any, k: Any, v: Any, segments: Any, saved: Any, d_out: Any
    ) -> tuple[jax.Array, ...]:
        out, statistics = saved
        usable = (statistics == 7.0).all() & (out == call(q, k, v, segments)[0]).all()
        return tuple(jnp.where(usable, g, jnp.nan) for g in call(q, k, v, segments, d_out)[1:])

    monkeypatch.setattr(cudnn_attention, "forward", forward)
    monkeypatch.setattr(cudnn_attention, "backward", backward)


def refused(*_: Any) -> jax.Array:
    return jnp.full((*IDS.shape, HEADS, HEAD_DIM), jnp.nan)


@pytest.mark.usefixtures("stand_in")
def test_packed_rows_with_grouped_heads_as_cudnn_reads_them() -> None:
    q, k, v, d_out = arrays(IDS)
    attend = jax.jit(functools.partial(packed_attention, segment_ids=IDS, otherwise=refused))
    out, vjp = jax.vjp(lambda *x: attend(*x), q, k, v)
    found = [out, *vjp(jnp.asarray(d_out))]
    # Padding has numbers, which no gradient reaches.
    assert all(np.isfinite(x).all() for x in found)
    found[0] = jnp.where((IDS != 0)[..., None, None], out, 0)
    for name, a, b in zip(
        "out q k v".split(), found, expected_of(IDS, q, k, v, d_out), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(attend(q, k, v), out, atol=1e-6)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("value_dim", [HEAD_DIM, 5])
def test_a_kernel_among_others(value_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_attention, "check", lambda *_: None)  # float32 is checked closer
    monkeypatch.setattr(attention, "_flash", refused)  # rows of more segments: below
    q, k, v, d_out = arrays(IDS, value_dim)
    execution = Execution(attention="cudnn")

    def total(q: Any, k: Any, v: Any) -> jax.Array:
        out = row_attention(q, k, v, jnp.asarray(IDS), execution, single_device())
        return jnp.sum(out * d_out)

    found = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(found, expected_of(IDS, q, k, v, d_out)[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_segments_are_the_runs_of_all_rows_and_cover_every_token() -> None:
    found = find_segments(jnp.asarray(IDS), 4)
    # 8 runs of the first row, 1 of each other one; 12 are room enough.
    assert found.lengths.tolist() == [[3, 4, 2, 1], [4, 2, 16, 16], [0, 0, 0, 0]]
    assert found.starts.ravel().tolist() == [0, 3, 7, 9, 10, 14, 16, 32, *[48] * 7]
    assert found.fit and not find_segments(jnp.asarray(IDS), 2).fit
    full = jnp.arange(12).reshape(2, 6)  # as many as there is room for
    assert find_segments(full, 6).fit and find_segments(full, 6).lengths.tolist() == [[1] * 6] * 2
    assert [segments_a_row(time) for time in (64, 2048, 8192, 65_536)] == [8, 16, 64, 64]


@pytest.mark.usefixtures("stand_in")
def test_more_segments_than_the_program_has_room_for_go_to_the_other_kernel() -> None:
    ids = np.broadcast_to(np.arange(1, 17, dtype=np.int32), (3, 16))
    assert not find_segments(jnp.asarray(ids), segments_a_row(16)).fit
    q, k, v, d_out = arrays(ids)

    def attend(q: Any, k: Any, v: Any) -> jax.Array:
        return packed_attention(q, k, v, ids, attention._xla)

    out, vjp = jax.vjp(jax.jit(attend), q, k, v)
    found = [out, *vjp(jnp.asarray(d_out))]
    for a, b in zip(found, expected_of(ids, q, k, v, d_out), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_programs_have_cudnns_calls_with_key_heads_as_they_are() -> None:
    """Also the test that the private primitives of the JAX at hand take what they are given."""
    batch, time = 2, 256

    def total(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        return jnp.sum(packed_attention(q, k, v, ids, attention._xla).astype(jnp.float32))

    given = (
        *(array(batch, time, n, 64) for n in (6, 2, 2)),
        array(batch, time, dtype=jnp.int32),
    )
    for function, calls in (total, 1), (jax.grad(total, argnums=(0, 1, 2)), 2):
        try:
            lowered = jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",))
        except (TypeError, AttributeError, ImportError) as error:
            raise AssertionError(
                f"JAX {jax.__version__} has other cuDNN primitives than those that "
                "r1jax/models/cudnn_attention.py binds; they are private, and may change"
            ) from error
        lines = [x for x in lowered.as_text().splitlines() if "__cudnn$fmhaSoftmax" in x]
        assert len(lines) == calls
        for line in lines:
            assert r"\22max_seg_per_batch\22: 8" in line or '"max_seg_per_batch": 8' in line
            assert "PADDING_CAUSAL" in line
            assert "tensor<2x256x2x64xbf16>" in line and "tensor<2x9xi32>" in line
            # The backward pass reads statistics of each segment.
            assert ("tensor<16x6x256xf32>" in line) == (calls == 2)


def long_rows() -> np.ndarray:
    """Segments that begin and end within, at and across blocks of 128 and of 64 tokens."""
    ids = np.zeros((2, 300), np.int32)
    for segment, (start, end) in {7: (3, 64), 2: (64, 65), 9: (70, 270)}.items():
        ids[0, start:end] = segment
    ids[1, :128], ids[1, 128:] = 1, 2
    return ids


@pytest.mark.parametrize("value_dim", [HEAD_DIM, 5])
def test_the_pallas_kernel_over_packed_rows_with_grouped_heads(value_dim: int) -> None:
    ids = long_rows()
    q, k, v, d_out = arrays(ids, value_dim)
    out, vjp = jax.vjp(lambda *x: flash_attention(*x, ids, interpret=True), q, k, v)
    found = [out, *jax.jit(vjp)(jnp.asarray(d_out))]
    assert all(np.isfinite(x).all() for x in found)
    found[0] = jnp.where((ids != 0)[..., None, None], out, 0)
    for name, a, b in zip(
        "out q k v".split(), found, expected_of(ids, q, k, v, d_out), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_blocks_of_other_segments_are_not_read() -> None:
    ids = long_rows()[1:]

    @jax.jit
    def run(q: Any, k: Any, v: Any, d_out: Any) -> list[jax.Array]:
        out, vjp = jax.vjp(lambda *x: flash_attention(*x, ids, interpret=True), q, k, v)
        return [out, *vjp(d_out)]

    expected = run(*arrays(ids))
    for others, those in (slice(128), slice(128, None)), (slice(128, None), slice(128)):
        spoilt = arrays(ids)
        for x in spoilt:
            x[:, others] = np.nan  # a mask would not help: 0 x NaN is NaN
        for a, b in zip(run(*spoilt), expected, strict=True):
            np.testing.assert_array_equal(a[:, those], b[:, those])


def test_ranges_are_the_runs_of_equal_ids() -> None:
    starts, ends = ranges_of(jnp.asarray(IDS))
    assert starts[0].tolist() == [0] * 3 + [3] * 4 + [7] * 2 + [9] + [10] * 4 + [14] * 2
    assert ends[0].tolist() == [3] * 3 + [7] * 4 + [9] * 2 + [10] + [14] * 4 + [16] * 2
    assert starts[1:].tolist() == [[0] * 16] * 2 and ends[1:].tolist() == [[16] * 16] * 2


class Ampere:
    compute_capability = "8.0"


@pytest.mark.parametrize(
    ("q", "value_dim", "device", "reason"),
    [
        (
            array(1, 64, 2, 64, dtype=jnp.float32),
            64,
            None,
            "compute_dtype is float32; or use flash",
        ),
        (array(1, 64, 2, 192), 128, None, "at most 128, a multiple of 8"),
        (array(1, 64, 2, 60), 60, None, "at most 128, a multiple of 8"),
        (array(1, 64, 2, 64), 128, None, "values of 128"),
        (array(64, 8192, 32, 128), 128, None, "64 rows of 8192 tokens on a device have 2147483648"),
        (array(1, 64, 2, 64), 64, Ampere(), "a Hopper GPU, and this one has 8.0"),
    ],
)
def test_what_cudnn_would_refuse_or_misread_is_refused(
    q: Any, value_dim: int, device: Any, reason: str
) -> None:
    check(array(1, 64, 2, 128), array(1, 64, 1, 128), jax.devices()[0])
    with pytest.raises(ValueError, match=reason):
        check(q, array(*q.shape[:2], 1, value_dim), device)
