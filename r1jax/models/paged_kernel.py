"""A TPU kernel that reads the live pages of a KV cache, and nothing else, once each.

Pages lie wherever they were free. The kernel copies them from HBM a group at a time, all of one
slot, side by side into VMEM, so that their scores are one matrix product; the next group is on its
way meanwhile. It reads a stack of layers by index: no layer's slice is copied. Written after
PagedAttention (arXiv 2309.06180) and flash-decoding.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.models.kv_cache import LayerCache
from r1jax.models.paged_cache import PageList

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

PAGE_KERNEL = "paged_attention"  # its name in a compiled program, by which the planner finds it

_MASKED = -1e30
_GROUP_TOKENS = 2048  # of the pages that are read together
_LANES = 128
# Of a chip's VMEM, what the kernel's arrays may take: a third of it, or less.
_VMEM_BYTES = {"TPU v4": 8 * 2**20}
_OTHER_VMEM_BYTES = 24 * 2**20


class PartialSoftmax(NamedTuple):
    """Of each query and a part of its keys: the highest logit, the sum of exp(logit - peak), and
    the values weighted by it."""

    peak: Float[Array, "slots kv_heads rows"]
    total: Float[Array, "slots kv_heads rows"]
    out: Float[Array, "slots kv_heads rows value_dim"]


@struct.dataclass
class PageGroups:
    """The pages of a `PageList`, in groups of one slot each.

    starts, sizes: where in the list, and how many pages. owners: the slot.
    hidden: added to the logits: 0 where an entry holds a token.
    """

    pages: Int[Array, "shards list"]
    starts: Int[Array, "shards groups"]
    sizes: Int[Array, "shards groups"]
    owners: Int[Array, "shards groups"]
    hidden: Float[Array, "shards groups 1 tokens"]
    count: Int[Array, " shards"]


def group_pages(reads: PageList, slots: int) -> PageGroups:
    """Groups for `paged_softmax`; the same for all layers, so made once for a step.

    The list has the pages of a slot side by side.
    """
    page = reads.filled.shape[-1]
    size = max(1, _GROUP_TOKENS // page)

    def of_shard(pages: jax.Array, owners: jax.Array, filled: jax.Array) -> tuple[jax.Array, ...]:
        index = jnp.arange(len(pages), dtype=jnp.int32)
        listed = owners < slots
        first = jnp.concatenate([jnp.ones(1, bool), owners[1:] != owners[:-1]])
        of_slot = index - jax.lax.cummax(jnp.where(first, index, 0))
        begins = listed & (of_slot % size == 0)
        at = jnp.where(begins, jnp.cumsum(begins) - 1, len(pages))
        groups = slots + len(pages) // size
        starts = jnp.zeros(groups, jnp.int32).at[at].set(index, mode="drop")
        of_group = jnp.full(groups, slots, jnp.int32).at[at].set(owners, mode="drop")
        members = starts[:, None] + jnp.arange(size, dtype=jnp.int32)
        same = owners.at[members].get(mode="fill", fill_value=slots) == of_group[:, None]
        same &= (of_group < slots)[:, None]
        seen = filled.at[members].get(mode="fill", fill_value=False) & same[..., None]
        hidden = jnp.where(seen, 0.0, _MASKED).reshape(groups, 1, size * page)
        return pages, starts, same.sum(1, dtype=jnp.int32), of_group, hidden, begins.sum()

    pages, starts, sizes, owners, hidden, count = jax.vmap(of_shard)(
        reads.pages, reads.slots, reads.filled
    )
    return PageGroups(pages, starts, sizes, owners, hidden, count.astype(jnp.int32))


def vmem_bytes(slots: int, kv_heads: int, rows: int, widths: tuple[int, int]) -> int:
    """Of the queries and results of a device's slots, and of the pages that are under way.

    Args:
      rows: queries of a slot and key head.
      widths: of a key and of a value, of which a number has two bytes.
    """
    key, value = (-(-width // _LANES) * _LANES for width in widths)
    of_row = 2 * key + 4 * value + 2 * 4 * _LANES
    pages = 2 * 2 * _GROUP_TOKENS * (key + value)
    return kv_heads * (slots * _padded(rows) * of_row + pages)


def fits(needed: int, device_kind: str) -> bool:
    """Whether so many bytes of a chip's VMEM are free for the kernel."""
    return needed <= _VMEM_BYTES.get(device_kind, _OTHER_VMEM_BYTES)


def _padded(rows: int) -> int:
    return -(-rows // 16) * 16  # what a register of two-byte numbers holds


def paged_softmax(
    q: Float[Array, "slots kv_heads rows head_dim"],
    pages: LayerCache,
    layer: Int[Array, ""],
    groups: PageGroups,
    *,
    interpret: bool = False,
) -> PartialSoftmax:
    """Attention of each slot's queries to its pages, of one device.

    Args:
      pages: keys and values of a stack [layers, 1, pages, kv_heads, page, head_dim]; latents are
        both, given once.
      groups: of a single shard.
      interpret: run it on a CPU, in JAX's interpreter of kernels.

    Returns:
      Of a slot without pages: the lowest peak, and 0.
    """
    slots, kv_heads, rows, head_dim = q.shape
    page, value_dim = pages[-1].shape[-2:]
    tokens = groups.hidden.shape[-1]
    padded = _padded(rows)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def result(width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((slots, kv_heads, padded, width), jnp.float32)

    shapes = (result(_LANES), result(_LANES), result(value_dim))
    buffers = [
        pltpu.VMEM((2, kv_heads, tokens, stored.shape[-1]), stored.dtype) for stored in pages
    ]
    needed = vmem_bytes(slots, kv_heads, rows, (head_dim, value_dim))
    scalars = jnp.stack([layer.astype(jnp.int32), groups.count[0]])
    kernel = functools.partial(_kernel, len(pages), page, 1 / math.sqrt(head_dim))
    peak, total, out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(jnp.maximum(groups.count[0], 1),),
            in_specs=[
                whole(*q.shape),
                pl.BlockSpec((None, 1, tokens), lambda g, *_: (g, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(pages),
            ],
            out_specs=[whole(*each.shape) for each in shapes],
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2, len(pages)))],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            # Half as much again for what the compiler keeps beside them.
            vmem_limit_bytes=max(16 * 2**20, needed + needed // 2),
        ),
        name=PAGE_KERNEL,
        interpret=interpret,
    )(
        scalars,
        groups.starts[0],
        groups.sizes[0],
        groups.owners[0],
        groups.pages[0],
        q,
        groups.hidden[0],
        *pages,
    )
    return PartialSoftmax(peak[:, :, :rows, 0], total[:, :, :rows, 0], out[:, :, :rows])


def _kernel(
    arrays: int,
    page: int,
    scale: float,
    scalars: Any,
    starts: Any,
    sizes: Any,
    owners: Any,
    ids: Any,
    q: Any,
    hidden: Any,
    *refs: Any,
) -> None:
    """One group of pages. refs: keys and values in HBM, results, a buffer of each, semaphores."""
    stored, (peaks, totals, outs) = refs[:arrays], refs[arrays : arrays + 3]
    buffers, semaphores = refs[arrays + 3 : -1], refs[-1]
    group, layer, count = pl.program_id(0), scalars[0], scalars[1]
    at_once = buffers[0].shape[2] // page

    def copies(group: Any, action: str) -> None:
        half = jax.lax.rem(group, 2)
        for j in range(at_once):

            @pl.when(j < sizes[group])
            def _(j: int = j) -> None:
                for n, (source, buffer) in enumerate(zip(stored, buffers, strict=True)):
                    copy = pltpu.make_async_copy(
                        source.at[layer, 0, ids[starts[group] + j]],
                        buffer.at[half, :, pl.ds(j * page, page), :],
                        semaphores.at[half, n],
                    )
                    getattr(copy, action)()

    @pl.when(group == 0)
    def _() -> None:
        peaks[...] = jnp.full(peaks.shape, _MASKED, jnp.float32)
        totals[...] = jnp.zeros(totals.shape, jnp.float32)
        outs[...] = jnp.zeros(outs.shape, jnp.float32)
        # What is not copied is weighed with 0, and must be a number.
        for buffer in buffers:
            buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)

    @pl.when((group == 0) & (count > 0))
    def _() -> None:
        copies(group, "start")

    @pl.when(group + 1 < count)
    def _() -> None:
        copies(group + 1, "start")

    @pl.when(group < count)
    def _() -> None:
        copies(group, "wait")
        half, slot = jax.lax.rem(group, 2), owners[group]
        for head in range(q.shape[1]):
            keys, values = buffers[0][half, head], buffers[-1][half, head]
            logits = jax.lax.dot_general(
                q[slot, head], keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            logits = logits * scale + hidden[...]
            old = peaks[slot, head]
            new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - new[:, :1])
            kept = jnp.exp(old - new)
            out = jax.lax.dot_general(
                weights.astype(values.dtype),
                values,
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            peaks[slot, head] = new
            totals[slot, head] = totals[slot, head] * kept + jnp.sum(weights, 1, keepdims=True)
            outs[slot, head] = outs[slot, head] * kept[:, :1] + out
