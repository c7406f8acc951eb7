"""A GPU kernel (Pallas Triton) that reads the live pages of a KV cache, and nothing else.

A program takes some query rows of one slot and key head, and a part of the slot's pages, over which
it keeps a softmax in float32; the parts are then combined (flash-decoding). It reads a stack of
layers by index: no layer's slice is copied. Interpreted, and compiled for sm_80 and sm_90 without a
GPU: its speed was not measured. JAX 0.11 still has Triton, and deprecates it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl

from r1jax.models.kv_cache import LayerCache
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel import PAGE_KERNEL, KernelShape, PartialSoftmax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

_MASKED = -1e30
_LEAST = 16  # rows, columns and depth of a matrix product
# Of a multiprocessor's registers (256 KiB), the results; of its shared memory, keys and values.
_RESULT_VALUES = 2**15
_TILE_BYTES = 48 * 2**10
_TILE_TOKENS = 64
# Programs for about 132 multiprocessors: each takes more pages, or more of them take a slot's.
_PROGRAMS = 2048
_MOST_PARTS = 16


@struct.dataclass
class SlotPages:
    """The pages of a `PageList` by slot: sizes[i] of them from starts[i] on.

    hidden: added to the logits: 0 where an entry holds a token.
    """

    pages: Int[Array, "shards list"]
    starts: Int[Array, "shards slots"]
    sizes: Int[Array, "shards slots"]
    hidden: Float[Array, "shards list page"]


class Tile(NamedTuple):
    """Query rows and tokens that a program multiplies at a time."""

    rows: int
    tokens: int


def pages_of_slots(reads: PageList, slots: int) -> SlotPages:
    """For `softmax_of_slots`; the same for all layers, so made once for a step.

    The list has the pages of a slot side by side.
    """

    def of_shard(owners: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jnp.arange(len(owners), dtype=jnp.int32)
        starts = jnp.full(slots, len(owners), jnp.int32).at[owners].min(index, mode="drop")
        return starts, jnp.zeros(slots, jnp.int32).at[owners].add(1, mode="drop")

    hidden = jnp.where(reads.filled, 0.0, _MASKED).astype(jnp.float32)
    return SlotPages(reads.pages, *jax.vmap(of_shard)(reads.slots), hidden)


def tile(shape: KernelShape, page: int) -> Tile | None:
    """What fits into a multiprocessor; None where Triton's products do not take it.

    Args:
      page: tokens of a page.
    """
    if any(width % _LEAST for width in shape.widths):
        return None
    most = 2 ** int(math.log2(_RESULT_VALUES / shape.widths[-1]))
    rows = min(most, max(_LEAST, 2 ** math.ceil(math.log2(shape.rows))))
    tokens = math.gcd(page, _TILE_TOKENS)
    while tokens * sum(shape.widths) * shape.itemsize > _TILE_BYTES:
        tokens //= 2
    return Tile(rows, tokens) if min(rows, tokens) >= _LEAST else None


def softmax_of_slots(
    q: Float[Array, "slots kv_heads rows head_dim"],
    pages: LayerCache,
    layer: Int[Array, ""],
    reads: SlotPages,
    *,
    interpret: bool = False,
) -> PartialSoftmax:
    """Attention of each slot's queries to its pages, of one device.

    Args:
      pages: keys and values of a stack [layers, 1, pages, kv_heads, page, head_dim]; latents are
        both, given once.
      reads: of a single shard.
      interpret: run it on a CPU, in JAX's interpreter of kernels.

    Returns:
      Of a slot without pages: the lowest peak, and 0.
    """
    from jax.experimental.pallas import triton

    slots, kv_heads, rows, head_dim = q.shape
    page, value_dim = pages[-1].shape[-2:]
    widths = tuple(each.shape[-1] for each in pages)
    size = tile(KernelShape(kv_heads, rows, widths, pages[0].dtype.itemsize), page)
    assert size is not None, "`tile` says where the kernel is used"
    blocks = -(-rows // size.rows)
    padded = blocks * size.rows
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    parts = max(1, min(_MOST_PARTS, _PROGRAMS // (slots * kv_heads * blocks)))

    def head_and_rows(block: Any) -> tuple[Any, Any]:
        return jax.lax.div(block, blocks), jax.lax.rem(block, blocks)

    def whole(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)

    def result(*rest: int) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
        def index(block: Any, slot: Any, part: Any) -> tuple[Any, ...]:
            return part, slot, *head_and_rows(block), *(0 for _ in rest)

        spec = pl.BlockSpec((None, None, None, size.rows, *rest), index)
        shape = (parts, slots, kv_heads, padded, *rest)
        return spec, jax.ShapeDtypeStruct(shape, jnp.float32)

    out_specs, out_shapes = zip(result(), result(), result(value_dim), strict=True)
    groups = reads.starts[0], reads.sizes[0], reads.pages[0], reads.hidden[0]
    arrays = [layer.astype(jnp.int32)[None], *groups, *pages]
    kernel = functools.partial(_kernel, size.tokens, blocks, parts, 1 / math.sqrt(head_dim))
    # Programs that follow each other read the same slot's pages, the later ones from the cache.
    peaks, totals, outs = pl.pallas_call(
        kernel,
        grid=(kv_heads * blocks, slots, parts),
        in_specs=[
            pl.BlockSpec(
                (None, None, size.rows, head_dim),
                lambda block, slot, _: (slot, *head_and_rows(block), 0),
            ),
            *map(whole, arrays),
        ],
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=triton.CompilerParams(
            num_warps=8 if size.rows * value_dim > 2**12 else 4, num_stages=2
        ),
        name=PAGE_KERNEL,
        interpret=interpret,
    )(q, *arrays)
    peak = jnp.max(peaks, axis=0)
    scale = jnp.exp(peaks - peak)
    total = jnp.sum(totals * scale, axis=0)
    out = jnp.sum(outs * scale[..., None], axis=0)
    return PartialSoftmax(peak[:, :, :rows], total[:, :, :rows], out[:, :, :rows])


def _columns(width: int) -> list[pl.Slice]:
    """Slices of a power of two each, as Triton wants them: 576 is 512 and 64."""
    sizes = [2**bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    return [pl.Slice(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _kernel(
    tokens: int,
    blocks: int,
    parts: int,
    scale: float,
    q: Any,
    layer: Any,
    starts: Any,
    sizes: Any,
    ids: Any,
    hidden: Any,
    *refs: Any,
) -> None:
    """Some rows of a slot and key head, and a part of the slot's pages. refs: stored, results."""
    stored, (peaks, totals, outs) = refs[:-3], refs[-3:]
    keys_of, values_of = stored[0], stored[-1]
    head, slot, part = jax.lax.div(pl.program_id(0), blocks), pl.program_id(1), pl.program_id(2)
    rows, per_page = q.shape[0], hidden.shape[1] // tokens
    at, count, start = layer[0], sizes[slot], starts[slot]
    per_part = jax.lax.div(count + (parts - 1), parts)
    first = jnp.minimum(part * per_part, count)
    last = jnp.minimum(first + per_part, count)
    key_columns, value_columns = _columns(keys_of.shape[-1]), _columns(values_of.shape[-1])
    queries = [q[:, columns] for columns in key_columns]

    def add(step: jax.Array, old: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, *out = old
        listed = start + first + jax.lax.div(step, per_page)
        entries = pl.ds(jax.lax.rem(step, per_page) * tokens, tokens)

        def read(ref: Any, columns: Any) -> jax.Array:
            return ref[at, 0, ids[listed], head, entries, columns]

        keys = [read(keys_of, columns) for columns in key_columns]
        logits = sum(map(_product_with_transposed, queries, keys)) * scale
        logits = logits + hidden[listed, entries][None, :]
        new = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - new[:, None])
        kept = jnp.exp(peak - new)
        values = keys if len(stored) == 1 else [read(values_of, x) for x in value_columns]
        total = total * kept + jnp.sum(weights, axis=1)
        weights = weights.astype(values_of.dtype)
        out = [o * kept[:, None] + _product(weights, v) for o, v in zip(out, values, strict=True)]
        return new, total, *out

    zeros = [jnp.zeros((rows, columns.size), jnp.float32) for columns in value_columns]
    empty = (jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), *zeros)
    peak, total, *out = jax.lax.fori_loop(0, (last - first) * per_page, add, empty)
    peaks[...], totals[...] = peak, total
    for columns, each in zip(value_columns, out, strict=True):
        outs[:, columns] = each


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    dimensions = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _product_with_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
