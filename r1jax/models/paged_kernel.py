"""A TPU kernel that reads the live pages of a KV cache, and nothing else, once each.

Pages lie wherever they were free. The kernel copies them from HBM a group at a time, all of one
slot, side by side into VMEM, so that their scores are one matrix product; the next group is on its
way meanwhile. It reads a stack of layers by index: no layer's slice is copied. Of queries and
results only those of the group's slot are in VMEM. Written after PagedAttention (arXiv 2309.06180)
and flash-decoding.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.models.kv_cache import LayerCache
from r1jax.models.paged_cache import PageList

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

PAGE_KERNEL = "paged_attention"  # its name in a compiled program, by which the planner finds it
GROUP_KERNEL = "paged_attention_of_groups"  # the same for slots that read pages together

_MASKED = -1e30
_GROUP_TOKENS = 2048  # of the pages that are read together, at most
_LEAST_TOKENS = 256  # of them: with fewer, copies do not hide what a group costs beside them
_GROUP_HEADS = 8  # that are read together, at most: the kernel's code is repeated for each
_LANES, _SUBLANES = 128, 8
# Of a chip's VMEM, what the kernel may take: half of a TPU v4's, a third of the others' or less.
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
    with_pages: which slots own a group.
    heads: that are read together.
    """

    pages: Int[Array, "shards list"]
    starts: Int[Array, "shards groups"]
    sizes: Int[Array, "shards groups"]
    owners: Int[Array, "shards groups"]
    hidden: Float[Array, "shards groups 1 tokens"]
    with_pages: Bool[Array, "shards slots"]
    count: Int[Array, " shards"]
    heads: int = struct.field(pytree_node=False)


class GroupSize(NamedTuple):
    """What the kernel reads together: a slot's pages of so many tokens, of so many key heads."""

    heads: int
    tokens: int


def group_pages(reads: PageList, slots: int, size_of_group: GroupSize) -> PageGroups:
    """Groups for `paged_softmax`; the same for all layers, so made once for a step.

    The list has the pages of a slot side by side.
    """
    page = reads.filled.shape[-1]
    size = max(1, size_of_group.tokens // page)

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
        with_pages = jnp.zeros(slots, bool).at[owners].set(True, mode="drop")
        count = begins.sum(dtype=jnp.int32)
        return pages, starts, same.sum(1, dtype=jnp.int32), of_group, hidden, with_pages, count

    pages, starts, sizes, owners, hidden, with_pages, count = jax.vmap(of_shard)(
        reads.pages, reads.slots, reads.filled
    )
    return PageGroups(
        pages, starts, sizes, owners, hidden, with_pages, count, heads=size_of_group.heads
    )


@dataclass(frozen=True)
class KernelShape:
    """What the kernel's use of VMEM depends on; the number of slots is not part of it.

    kv_heads: of a device. rows: queries of a slot and key head.
    widths: of each stored array: keys and values, or latents.
    itemsize: bytes of a number of the cache.
    """

    kv_heads: int
    rows: int
    widths: tuple[int, ...]
    itemsize: int = 2


def vmem_bytes(shape: KernelShape, size: GroupSize) -> int:
    """Upper bound of what the kernel takes, which has arrays of one slot and two groups in VMEM."""
    widths = [-(-width // _LANES) * _LANES for width in shape.widths]
    rows, key, value = _padded(shape.rows), widths[0], widths[-1]
    pages = size.heads * size.tokens * sum(widths) * shape.itemsize
    hidden = _SUBLANES * size.tokens * 4
    queries = size.heads * rows * key * shape.itemsize
    results = size.heads * rows * (value + 2 * _LANES) * 4
    # Of one head: its keys and values, logits, weights, and their sum over the values.
    computed = size.tokens * (key + value) * shape.itemsize
    computed += rows * (size.tokens * (4 + 4 + shape.itemsize) + 2 * value * 4)
    return 2 * (pages + hidden + queries + results) + computed


def group_size(shape: KernelShape, page: int, device_kind: str) -> GroupSize | None:
    """The largest groups that fit into the VMEM of a chip; None where no group does."""
    limit = _VMEM_BYTES.get(device_kind, _OTHER_VMEM_BYTES)
    divisors = [n for n in range(1, _GROUP_HEADS + 1) if shape.kv_heads % n == 0]
    for heads in reversed(divisors):
        tokens = max(page, _GROUP_TOKENS)
        while tokens >= max(page, _LEAST_TOKENS):
            if vmem_bytes(shape, GroupSize(heads, tokens)) <= limit:
                return GroupSize(heads, tokens)
            tokens //= 2
    return None


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
    heads, tokens = groups.heads, groups.hidden.shape[-1]
    padded = _padded(rows)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))

    def of_slot(width: int) -> pl.BlockSpec:
        def index(block: Any, group: Any, *scalars: Any) -> tuple[Any, ...]:
            return jnp.minimum(scalars[3][group], slots - 1), block, 0, 0  # the group's owner

        return pl.BlockSpec((None, heads, padded, width), index)

    widths = (_LANES, _LANES, value_dim)
    buffers = [pltpu.VMEM((2, heads, tokens, each.shape[-1]), each.dtype) for each in pages]
    shape = KernelShape(
        kv_heads, rows, tuple(each.shape[-1] for each in pages), pages[0].dtype.itemsize
    )
    needed = vmem_bytes(shape, GroupSize(heads, tokens))
    scalars = jnp.stack([layer.astype(jnp.int32), groups.count[0]])
    kernel = functools.partial(_kernel, len(pages), page, 1 / math.sqrt(head_dim))
    peak, total, out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(kv_heads // heads, jnp.maximum(groups.count[0], 1)),
            in_specs=[
                of_slot(head_dim),
                pl.BlockSpec((None, 1, tokens), lambda _, group, *__: (group, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(pages),
            ],
            out_specs=[of_slot(width) for width in widths],
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2, len(pages)))],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((slots, kv_heads, padded, width), jnp.float32) for width in widths
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=needed + needed // 4,
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
    # Nothing is written for a slot without pages.
    read = groups.with_pages[0][:, None, None]
    return PartialSoftmax(
        jnp.where(read, peak[:, :, :rows, 0], _MASKED),
        jnp.where(read, total[:, :, :rows, 0], 0.0),
        jnp.where(read[..., None], out[:, :, :rows], 0.0),
    )


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
    """One group of pages, of a block of heads.

    q: of the group's slot. refs: keys and values in HBM, results of the slot, a buffer of each,
    semaphores.
    """
    stored, (peaks, totals, outs) = refs[:arrays], refs[arrays : arrays + 3]
    buffers, semaphores = refs[arrays + 3 : -1], refs[-1]
    block, group, layer, count = pl.program_id(0), pl.program_id(1), scalars[0], scalars[1]
    step = block * count + group
    heads, at_once = buffers[0].shape[1], buffers[0].shape[2] // page

    def copies(step: Any, action: str) -> None:
        half = jax.lax.rem(step, 2)
        block, group = jax.lax.div(step, count), jax.lax.rem(step, count)
        for j in range(at_once):

            @pl.when(j < sizes[group])
            def _(j: int = j) -> None:
                for n, (source, buffer) in enumerate(zip(stored, buffers, strict=True)):
                    copy = pltpu.make_async_copy(
                        source.at[layer, 0, ids[starts[group] + j], pl.ds(block * heads, heads)],
                        buffer.at[half, :, pl.ds(j * page, page), :],
                        semaphores.at[half, n],
                    )
                    getattr(copy, action)()

    @pl.when(step == 0)
    def _() -> None:
        # What is not copied is weighed with 0, and must be a number.
        for buffer in buffers:
            buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)

    @pl.when((step == 0) & (count > 0))
    def _() -> None:
        copies(step, "start")

    @pl.when(step + 1 < pl.num_programs(0) * count)
    def _() -> None:
        copies(step + 1, "start")

    @pl.when((group == 0) | (owners[group] != owners[jnp.maximum(group - 1, 0)]))
    def _() -> None:
        peaks[...] = jnp.full(peaks.shape, _MASKED, jnp.float32)
        totals[...] = jnp.zeros(totals.shape, jnp.float32)
        outs[...] = jnp.zeros(outs.shape, jnp.float32)

    @pl.when(group < count)
    def _() -> None:
        copies(step, "wait")
        half = jax.lax.rem(step, 2)
        for head in range(heads):
            keys, values = buffers[0][half, head], buffers[-1][half, head]
            logits = jax.lax.dot_general(
                q[head], keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            logits = logits * scale + hidden[...]
            old = peaks[head]
            new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - new[:, :1])
            kept = jnp.exp(old - new)
            out = jax.lax.dot_general(
                weights.astype(values.dtype),
                values,
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            peaks[head] = new
            totals[head] = totals[head] * kept + jnp.sum(weights, 1, keepdims=True)
            outs[head] = outs[head] * kept[:, :1] + out
