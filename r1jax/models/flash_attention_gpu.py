"""A GPU kernel (Pallas Triton) of causal attention over packed rows, forward and backward.

Key heads are read where they are by the query heads that share them. What a token sees is one range
of the row, from its segment's first token to itself: so segments need no ids in the kernels, blocks
of keys outside the ranges are never read, and only blocks at their ends are masked. Gradients of
keys and values add up in registers over the query heads that share them: no atomic sums, so that
they are the same in each run.

The algorithm is FlashAttention-2's (arXiv 2307.08691). Interpreted, and compiled for sm_80 and
sm_90 without a GPU: its speed was not measured.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_MASKED = -1e30  # finite: in a block where a token sees nothing, the peak must not be infinite
_BLOCK = 128  # tokens that rows are padded to: of the largest block that a program keeps
_LOG2_E = math.log2(math.e)


class Ranges(NamedTuple):
    """Of each token, its segment's first token and the one behind its last; also of padding."""

    starts: Int[Array, "batch time"]
    ends: Int[Array, "batch time"]


class Tiles(NamedTuple):
    """Tokens of a block that a program keeps, and of those that it steps over; warps of a program.

    Kept are queries, and of the gradients of keys and values these; stages are of loads ahead.
    """

    kept: int
    stepped: int
    warps: int
    stages: int


def ranges_of(segment_ids: Int[Array, "batch time"]) -> Ranges:
    """The runs of equal ids in each row."""
    time = segment_ids.shape[1]
    steps = jnp.arange(time, dtype=jnp.int32)
    begins = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 1)), constant_values=True
    )
    starts = jax.lax.cummax(jnp.where(begins[:, :-1], steps, 0), axis=1)
    ends = jax.lax.cummin(jnp.where(begins[:, 1:], steps + 1, time), axis=1, reverse=True)
    return Ranges(starts, ends)


def tiles(widest: int, itemsize: int) -> tuple[Tiles, Tiles]:
    """Of the forward pass, and of the backward pass, for heads of `widest` numbers."""
    if widest * itemsize > 256:  # 128 tokens would leave no registers or shared memory for the rest
        return Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2)
    return Tiles(128, 64, 4 if widest <= 64 else 8, 3), Tiles(128, 64, 8, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def flash_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch time kv_heads head_dim"],
    v: Float[Array, "batch time kv_heads value_dim"],
    segment_ids: Int[Array, "batch time"],
    interpret: bool = False,
) -> Float[Array, "batch time heads value_dim"]:
    """Attend within each run of equal ids, of padding too: the tokens of a segment are neighbours.

    Args:
      interpret: run it on a CPU, in JAX's interpreter of kernels.
    """
    return _flash_forward(q, k, v, segment_ids, interpret)[0]


def _flash_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    time = q.shape[1]
    padded = [_padded(x) for x in (q, k, v)]
    ranges = ranges_of(_whole_blocks(segment_ids))
    out, log_sums = _forward(padded, ranges, 1 / math.sqrt(q.shape[3]), interpret)
    out = out[:, :time, :, : v.shape[3]]
    return out, (q, k, v, segment_ids, out, log_sums)


def _flash_backward(
    interpret: bool, saved: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, k, v, segment_ids, out, log_sums = saved
    # Of a softmax: the gradient of a logit is its weight's, less what the whole row's would be.
    means = jnp.einsum("bthd,bthd->bht", out, d_out, preferred_element_type=jnp.float32)
    means = jnp.pad(means, ((0, 0), (0, 0), (0, log_sums.shape[2] - q.shape[1])))
    padded = [_padded(x) for x in (q, k, v, d_out)]
    ranges = ranges_of(_whole_blocks(segment_ids))
    grads = _backward(padded, (log_sums, means), ranges, 1 / math.sqrt(q.shape[3]), interpret)
    cut = [g[:, : x.shape[1], :, : x.shape[3]] for g, x in zip(grads, (q, k, v), strict=True)]
    return (*cut, None)


flash_attention.defvjp(_flash_forward, _flash_backward)


def _whole_blocks(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK), *((0, 0),) * (x.ndim - 2)))


def _padded(x: jax.Array) -> jax.Array:
    """Whole blocks of tokens, of heads whose size is a power of two, as Triton's arrays are."""
    width = max(16, 2 ** math.ceil(math.log2(x.shape[3])))
    return jnp.pad(_whole_blocks(x), ((0, 0),) * 3 + ((0, width - x.shape[3]),))


def _head(group: int, tokens: int, width: int) -> pl.BlockSpec:
    """All tokens of the key head that query head `h` reads; `group` 1: of the head itself."""
    return pl.BlockSpec((None, tokens, None, width), lambda i, h, b: (b, 0, h // group, 0))


def _block(tokens: int, width: int) -> pl.BlockSpec:
    """Block `i` of the tokens of head `h`."""
    return pl.BlockSpec((None, tokens, None, width), lambda i, h, b: (b, i, h, 0))


def _row(tokens: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, tokens), lambda i, h, b: (b, 0))


def _forward(
    arrays: list[jax.Array], ranges: Ranges, scale: float, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The output, and the base-2 logarithm of each query's sum of weights [batch, heads, time]."""
    from jax.experimental.pallas import triton

    q, k, v = arrays
    batch, time, heads, head_dim = q.shape
    value_dim, group = v.shape[3], heads // k.shape[2]
    size, _ = tiles(max(head_dim, value_dim), q.dtype.itemsize)
    sums = pl.BlockSpec((None, None, size.kept), lambda i, h, b: (b, h, i))
    out, log_sums = pl.pallas_call(
        functools.partial(_forward_kernel, size.stepped, scale * _LOG2_E),
        grid=(time // size.kept, heads, batch),
        in_specs=[
            _block(size.kept, head_dim),
            _head(group, time, head_dim),
            _head(group, time, value_dim),
            _row(time),
        ],
        out_specs=[_block(size.kept, value_dim), sums],
        out_shape=[
            jax.ShapeDtypeStruct((batch, time, heads, value_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, time), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        interpret=interpret,
        name="flash_attention",
    )(q, k, v, ranges.starts)
    return out, log_sums


def _forward_kernel(
    stepped: int,
    scale: float,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    starts_ref: Any,
    out_ref: Any,
    sums_ref: Any,
) -> None:
    rows = q_ref.shape[0]
    first = pl.program_id(0) * rows
    q = q_ref[...]
    starts = starts_ref[pl.ds(first, rows)]

    def step(masked: bool, block: Any, carry: Any) -> Any:
        out, peak, total = carry
        keys = pl.ds(block * stepped, stepped)
        logits = _dot(q, k_ref[keys, :], trans_b=True) * scale
        if masked:
            logits = _visible_only(logits, first, starts, block * stepped)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new_peak[:, None])
        shrink = jnp.exp2(peak - new_peak)
        out = out * shrink[:, None] + _dot(weights.astype(v_ref.dtype), v_ref[keys, :])
        return out, new_peak, total * shrink + jnp.sum(weights, axis=1)

    out = jnp.zeros((rows, v_ref.shape[-1]), jnp.float32)
    peak = jnp.full(rows, _MASKED, jnp.float32)
    carry = out, peak, jnp.zeros(rows, jnp.float32)
    out, peak, total = _over_keys(step, carry, first, starts, stepped)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    sums_ref[...] = peak + jnp.log2(total)


def _dot(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """In float32."""
    from jax.experimental.pallas import triton

    return triton.dot(a, b, trans_b=trans_b)


def _visible_only(
    logits: jax.Array, query: Any, starts: jax.Array, key: Any, *, keys: int = 1
) -> jax.Array:
    """Masks what the queries from `query` on do not see of the keys from `key` on.

    keys: axis of `logits`; the other one is of the queries.
    """
    of_keys = key + jax.lax.broadcasted_iota(jnp.int32, logits.shape, keys)
    of_queries = query + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1 - keys)
    starts = jnp.expand_dims(starts, keys)
    return jnp.where((starts <= of_keys) & (of_keys <= of_queries), logits, _MASKED)


def _over_keys(step: Any, carry: Any, first: Any, starts: jax.Array, stepped: int) -> Any:
    """Steps over the blocks of keys that some query sees; only those that all see are not masked.

    first, starts: of a block of queries, its first token, and the ranges' of all.
    """
    begin = jax.lax.div(jnp.min(starts), stepped)
    diagonal = jax.lax.div(first, stepped)  # blocks divide each other
    # Ranges begin in order, so that the last one's begin is in the row's latest segment.
    inside = jnp.minimum(_divided_up(jnp.max(starts), stepped), diagonal)
    end = _divided_up(first + starts.shape[0], stepped)
    carry = jax.lax.fori_loop(begin, inside, functools.partial(step, True), carry)
    carry = jax.lax.fori_loop(inside, diagonal, functools.partial(step, False), carry)
    return jax.lax.fori_loop(diagonal, end, functools.partial(step, True), carry)


def _divided_up(count: Any, size: int) -> Any:
    return jax.lax.div(count + (size - 1), size)


def _backward(
    arrays: list[jax.Array],
    per_query: tuple[jax.Array, jax.Array],
    ranges: Ranges,
    scale: float,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Gradients of q, k and v. arrays: these, and the output's; per_query: [batch, heads, time]."""
    from jax.experimental.pallas import triton

    q, k, v, d_out = arrays
    batch, time, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    _, size = tiles(max(head_dim, value_dim), q.dtype.itemsize)
    call = functools.partial(
        pl.pallas_call,
        compiler_params=triton.CompilerParams(num_warps=size.warps, num_stages=size.stages),
        interpret=interpret,
    )
    of_block = pl.BlockSpec((None, None, size.kept), lambda i, h, b: (b, h, i))
    (d_q,) = call(
        functools.partial(_query_kernel, size.stepped, scale),
        grid=(time // size.kept, heads, batch),
        in_specs=[
            _block(size.kept, head_dim),
            _head(group, time, head_dim),
            _head(group, time, value_dim),
            _block(size.kept, value_dim),
            of_block,
            of_block,
            _row(time),
        ],
        out_specs=[_block(size.kept, head_dim)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        name="flash_attention_dq",
    )(q, k, v, d_out, *per_query, ranges.starts)

    def grouped(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, time, group, width), lambda i, h, b: (b, 0, h, 0))

    of_group = pl.BlockSpec((None, group, time), lambda i, h, b: (b, h, 0))
    d_k, d_v = call(
        functools.partial(_key_kernel, size.stepped, group, scale),
        grid=(time // size.kept, kv_heads, batch),
        in_specs=[
            grouped(head_dim),
            _block(size.kept, head_dim),
            _block(size.kept, value_dim),
            grouped(value_dim),
            of_group,
            of_group,
            _row(time),
            _row(time),
        ],
        out_specs=[_block(size.kept, head_dim), _block(size.kept, value_dim)],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="flash_attention_dkv",
    )(q, k, v, d_out, *per_query, *ranges)
    return d_q, d_k, d_v


def _query_kernel(
    stepped: int,
    scale: float,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    sums_ref: Any,
    means_ref: Any,
    starts_ref: Any,
    d_q_ref: Any,
) -> None:
    rows = q_ref.shape[0]
    first = pl.program_id(0) * rows
    q, d_out, sums, means = q_ref[...], d_out_ref[...], sums_ref[...], means_ref[...]
    starts = starts_ref[pl.ds(first, rows)]

    def step(masked: bool, block: Any, d_q: jax.Array) -> jax.Array:
        keys = pl.ds(block * stepped, stepped)
        k = k_ref[keys, :]
        logits = _dot(q, k, trans_b=True) * (scale * _LOG2_E)
        if masked:
            logits = _visible_only(logits, first, starts, block * stepped)
        weights = jnp.exp2(logits - sums[:, None])
        d_weights = _dot(d_out, v_ref[keys, :], trans_b=True)
        d_logits = weights * (d_weights - means[:, None])
        return d_q + _dot(d_logits.astype(k.dtype), k)

    d_q = jnp.zeros(q_ref.shape, jnp.float32)
    d_q = _over_keys(step, d_q, first, starts, stepped)
    d_q_ref[...] = (d_q * scale).astype(d_q_ref.dtype)


def _key_kernel(
    stepped: int,
    group: int,
    scale: float,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    sums_ref: Any,
    means_ref: Any,
    starts_ref: Any,
    ends_ref: Any,
    d_k_ref: Any,
    d_v_ref: Any,
) -> None:
    columns = k_ref.shape[0]
    first = pl.program_id(0) * columns
    k, v = k_ref[...], v_ref[...]
    ends = ends_ref[pl.ds(first, columns)]

    def of_head(head: Any, carry: Any) -> Any:
        def step(masked: bool, block: Any, carry: Any) -> Any:
            d_k, d_v = carry
            queries = pl.ds(block * stepped, stepped)
            q, d_out = q_ref[queries, head, :], d_out_ref[queries, head, :]
            # [keys, queries]: the products below then take the weights from registers.
            logits = _dot(k, q, trans_b=True) * (scale * _LOG2_E)
            if masked:
                logits = _visible_only(logits, block * stepped, starts_ref[queries], first, keys=0)
            weights = jnp.exp2(logits - sums_ref[head, queries][None, :])
            d_v += _dot(weights.astype(d_out.dtype), d_out)
            d_weights = _dot(v, d_out, trans_b=True)
            d_logits = weights * (d_weights - means_ref[head, queries][None, :])
            return d_k + _dot(d_logits.astype(q.dtype), q), d_v

        # Queries from the block's own on to the end of its last segment. All of those behind the
        # block and in the segment of its first key see all of it.
        begin = jax.lax.div(first, stepped)
        diagonal = jax.lax.div(first + columns, stepped)
        inside = jnp.maximum(jax.lax.div(jnp.min(ends), stepped), diagonal)
        end = _divided_up(jnp.max(ends), stepped)
        carry = jax.lax.fori_loop(begin, diagonal, functools.partial(step, True), carry)
        carry = jax.lax.fori_loop(diagonal, inside, functools.partial(step, False), carry)
        return jax.lax.fori_loop(inside, end, functools.partial(step, True), carry)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_ref, v_ref))
    d_k, d_v = jax.lax.fori_loop(0, group, of_head, zeros)
    d_k_ref[...] = (d_k * scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)
