"""A GPU kernel (Pallas Triton) that reads the live pages of a KV cache, and nothing else.

A program takes some query rows of one slot and key head, and a part of the slot's pages, over which
it keeps a softmax in float32; the parts are then combined (flash-decoding). The last part reads the
slot's current page, too. It reads a stack of layers by index: no layer's slice is copied.

Slots whose first pages are the same, as those of a prompt, may read these together (as in Hydragen,
arXiv 2402.05099): the kernel runs over groups of slots, whose queries are rows of one product, and
then over what each slot has for itself, where a slot goes on from its group's softmax.

Interpreted, and compiled for an H200 without one: its speed was not measured. JAX 0.11
still has Triton, and deprecates it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl

from r1jax.models.kv_cache import LayerCache
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel import GROUP_KERNEL, PAGE_KERNEL, KernelShape, PartialSoftmax

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
_MOST_PARTS_OF_GROUP = 4  # whose results are as many as the queries of a group
_GROUP_ROWS = 64  # queries of slots that read pages together, of a key head


class Lists(NamedTuple):
    """Parts of a list of pages: sizes[i] of them from starts[i] on."""

    starts: Int[Array, "shards readers"]
    sizes: Int[Array, "shards readers"]


@struct.dataclass
class SlotGroups:
    """Slots that read pages together.

    members: the slots of a group; the number of slots stands for none.
    lists: the pages of each group. of_slot: the group of each slot, and which of its members it is;
        the number of groups stands for none.
    """

    members: Int[Array, "shards groups size"]
    lists: Lists
    of_slot: tuple[Int[Array, "shards slots"], Int[Array, "shards slots"]]


@struct.dataclass
class SlotPages:
    """The pages of a `PageList` by slot.

    hidden: added to the logits: 0 where an entry holds a token.
    lists: the pages that each slot reads for itself.
    groups: that read the others; None where each slot reads all of its pages.
    """

    pages: Int[Array, "shards list"]
    hidden: Float[Array, "shards list page"]
    lists: Lists
    groups: SlotGroups | None


class Tile(NamedTuple):
    """Query rows and tokens that a program multiplies at a time."""

    rows: int
    tokens: int


def pages_of_slots(reads: PageList, slots: int, rows: int) -> SlotPages:
    """For `softmax_of_slots`; the same for all layers, so made once for a step.

    The list has the pages of a slot side by side.

    Args:
      rows: queries of a slot and key head: where several slots' make one product, they read the
        pages with which their lists begin together.
    """
    together = min(_GROUP_ROWS // rows, slots)

    def of_shard(owners: jax.Array) -> Lists:
        index = jnp.arange(len(owners), dtype=jnp.int32)
        starts = jnp.full(slots, len(owners), jnp.int32).at[owners].min(index, mode="drop")
        return Lists(starts, jnp.zeros(slots, jnp.int32).at[owners].add(1, mode="drop"))

    hidden = jnp.where(reads.filled, 0.0, _MASKED).astype(jnp.float32)
    lists, groups = jax.vmap(of_shard)(reads.slots), None
    if together > 1:
        grouped = jax.vmap(partial(_groups, together=together))
        groups, lists = grouped(reads.pages, reads.slots, lists)
    return SlotPages(reads.pages, hidden, lists, groups)


def _groups(
    pages: Int[Array, " list"], owners: Int[Array, " list"], lists: Lists, together: int
) -> tuple[SlotGroups, Lists]:
    """Groups of at most `together` slots whose lists begin with the same page; the lists' rest."""
    starts, sizes = lists
    slots, most = len(starts), len(starts) // 2
    slot, index = (jnp.arange(n, dtype=jnp.int32) for n in (slots, len(pages)))
    first = jnp.where(sizes > 0, pages.at[starts].get(mode="clip"), -1)
    same = (first[:, None] == first) & (sizes > 0)
    rank = jnp.sum(same & (slot < slot[:, None]), axis=1, dtype=jnp.int32)
    others = jnp.sum(same, axis=1, dtype=jnp.int32) - rank - 1
    member = rank % together
    leads = (member == 0) & (others > 0)
    # Of the first slot of a group, which is the one of its rank that has the same first page.
    led = same & (rank == (rank - member)[:, None])
    leader = jnp.sum(jnp.where(led, slot, 0), axis=1, dtype=jnp.int32)
    number = jnp.cumsum(leads) - 1
    group = jnp.where((sizes > 0) & leads[leader], number[leader], most).astype(jnp.int32)
    members = jnp.full((most, together), slots, jnp.int32)
    members = members.at[group, member].set(slot, mode="drop")

    # How many pages of a slot are those of its leader.
    owner = jnp.minimum(owners, slots - 1)
    leads_list, offset = leader[owner], index - starts[owner]
    equal = pages == pages.at[starts[leads_list] + offset].get(mode="clip")
    differs = jnp.where(equal & (offset < sizes[leads_list]), len(pages), offset)
    common = sizes.at[owners].min(differs, mode="drop")
    shared = jnp.min(common.at[members].get(mode="fill", fill_value=len(pages)), axis=1)
    shared = jnp.where(members[:, 0] < slots, shared, 0)
    of_group = Lists(starts.at[members[:, 0]].get(mode="fill", fill_value=0), shared)
    elsewhere = shared.at[group].get(mode="fill", fill_value=0)
    return (
        SlotGroups(members, of_group, (group, member)),
        Lists(starts + elsewhere, sizes - elsewhere),
    )


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


class CurrentPages(NamedTuple):
    """The page that each slot fills.

    stored: as the pages, [layers, 1, slots, kv_heads, page, width].
    hidden: added to the logits of a token; 0 where it attends to the entry.
    """

    stored: LayerCache
    hidden: Float[Array, "slots tokens page"]


def softmax_of_slots(
    q: Float[Array, "slots kv_heads rows head_dim"],
    pages: LayerCache,
    current: CurrentPages,
    layer: Int[Array, ""],
    reads: SlotPages,
    *,
    interpret: bool = False,
) -> PartialSoftmax:
    """Attention of each slot's queries to its pages and its current page, of one device.

    Args:
      q: of a key head, the rows of a token side by side.
      pages: keys and values of a stack [layers, 1, pages, kv_heads, page, head_dim]; latents are
        both, given once.
      reads: of a single shard.
      interpret: run it on a CPU, in JAX's interpreter of kernels.
    """
    rows, groups = q.shape[2], reads.groups
    run = partial(_run_kernel, q=q, pages=pages, layer=layer, reads=reads, interpret=interpret)
    extra, before = [current.hidden, *current.stored], 0
    if groups is not None:
        # What a group has computed, its slots go on from.
        members, sizes = groups.members[0], groups.lists.sizes[0]
        of_groups = run(groups.lists, members.shape[1] * rows, [members], _MOST_PARTS_OF_GROUP)
        extra += [*(x[0] for x in groups.of_slot), sizes, *of_groups]
        before = len(of_groups.peak)
    peaks, totals, outs = run(reads.lists, rows, extra, _MOST_PARTS, before)
    if len(peaks) == 1:
        return PartialSoftmax(peaks[0], totals[0], outs[0])
    peak = jnp.max(peaks, axis=0)
    scale = jnp.exp(peaks - peak)
    total = jnp.sum(totals * scale, axis=0)
    return PartialSoftmax(peak, total, jnp.sum(outs * scale[..., None], axis=0))


def _run_kernel(
    lists: Lists,
    rows: int,
    extra: list[jax.Array],
    most_parts: int,
    before: int | None = None,
    *,
    q: Float[Array, "slots kv_heads rows_of_slot head_dim"],
    pages: LayerCache,
    layer: Int[Array, ""],
    reads: SlotPages,
    interpret: bool,
) -> PartialSoftmax:
    """Of one reader for each list, of a single shard; results [parts, readers, kv_heads, rows].

    Args:
      rows: of a reader and key head.
      extra: of groups their members. Of slots what is hidden of their current pages, these, and
        where `before` counts parts of groups: group and member of each slot, the groups' sizes, and
        their results, of which parts without a page are not written.
      before: None of groups.
    """
    from jax.experimental.pallas import triton

    readers, (_, kv_heads, _, head_dim) = lists.starts.shape[1], q.shape
    page, value_dim = pages[-1].shape[-2:]
    widths = tuple(each.shape[-1] for each in pages)
    size = tile(KernelShape(kv_heads, rows, widths, pages[0].dtype.itemsize), page)
    assert size is not None, "`tile` says where the kernel is used"
    blocks = -(-rows // size.rows)
    parts = max(1, min(most_parts, _PROGRAMS // (readers * kv_heads * blocks)))

    def whole(x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

    results = [
        jax.ShapeDtypeStruct((parts, readers, kv_heads, rows, *rest), jnp.float32)
        for rest in ((), (), (value_dim,))
    ]
    starts, sizes = (x[0] for x in lists)
    arrays = [q, layer.astype(jnp.int32)[None], starts, sizes, reads.pages[0], reads.hidden[0]]
    arrays += [*pages, *extra]
    given = _Static(size, blocks, parts, len(pages), 1 / math.sqrt(head_dim), rows, before)
    # Programs that follow each other read the same pages, the later ones from the cache.
    found = pl.pallas_call(
        partial(_kernel, given),
        grid=(kv_heads * blocks, readers, parts),
        in_specs=[*map(whole, arrays)],
        out_specs=[*map(whole, results)],
        out_shape=results,
        compiler_params=triton.CompilerParams(
            num_warps=8 if size.rows * value_dim > 2**12 else 4, num_stages=2
        ),
        name=GROUP_KERNEL if before is None else PAGE_KERNEL,
        interpret=interpret,
    )(*arrays)
    return PartialSoftmax(*found)


class _Static(NamedTuple):
    """What is static in a kernel; `before` as of `_run_kernel`, `rows` of a reader, `stored` counts
    the arrays of a layer."""

    size: Tile
    blocks: int
    parts: int
    stored: int
    scale: float
    rows: int
    before: int | None


def _columns(width: int) -> list[pl.Slice]:
    """Slices of a power of two each, as Triton wants them: 576 is 512 and 64."""
    sizes = [2**bit for bit in reversed(range(width.bit_length())) if width >> bit & 1]
    return [pl.Slice(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _kernel(given: _Static, q: Any, layer: Any, *refs: Any) -> None:
    """Some rows of a reader and key head, and a part of the reader's pages.

    refs: as `_run_kernel` gives them, and its results.
    """
    from jax.experimental.pallas import triton

    size, stored, rows, parts = given.size, given.stored, given.rows, given.parts
    (starts, sizes, ids, hidden), refs, results = refs[:4], refs[4:-3], refs[-3:]
    pages, extra = refs[:stored], refs[stored:]
    block, reader, part = (pl.program_id(i) for i in range(3))
    head = jax.lax.div(block, given.blocks)
    first_row = jax.lax.rem(block, given.blocks) * size.rows
    row = first_row + jnp.arange(size.rows)
    is_row = row < rows
    at, count, start = layer[0], sizes[reader], starts[reader]

    def of_part(count: Any, parts: int, part: Any) -> tuple[Any, Any]:
        """From which page on, up to which."""
        each = jax.lax.div(count + (parts - 1), parts)
        first = jnp.minimum(part * each, count)
        return first, jnp.minimum(first + each, count)

    first, last = of_part(count, parts, part)
    per_page = pages[0].shape[-2] // size.tokens
    key_columns, value_columns = (_columns(pages[i].shape[-1]) for i in (0, -1))

    def rows_at(ref: Any, *before: Any, of: Any = first_row, columns: Any = None) -> Any:
        rest = () if columns is None else (columns,)
        return ref.at[(*before, head, pl.ds(of, size.rows), *rest)]

    if given.before is None:
        of_slot, members = q.shape[2], extra[0]
        member = jnp.minimum(jax.lax.div(row, of_slot), members.shape[1] - 1)
        slot = members[reader, member]
        is_row = is_row & (slot < q.shape[0])
        slot, row_of_slot = jnp.minimum(slot, q.shape[0] - 1), jax.lax.rem(row, of_slot)
        wide = [(columns.start + jnp.arange(columns.size))[None, :] for columns in key_columns]
        heads = jnp.broadcast_to(head, (size.rows, 1))
        queried = [q.at[slot[:, None], heads, row_of_slot[:, None], x] for x in wide]
    else:
        queried = [rows_at(q, reader, columns=columns) for columns in key_columns]
    queries = [triton.load(ref, mask=is_row[:, None], other=0.0) for ref in queried]

    def add(
        old: tuple[jax.Array, ...], of_page: tuple[Any, ...], index: Any, entries: Any, shown: Any
    ) -> tuple[jax.Array, ...]:
        """The softmax with these entries of a page. shown: what is added to the logits."""
        peak, total, *out = old

        def read(ref: Any, columns: Any) -> jax.Array:
            return ref[at, 0, index, head, entries, columns]

        keys = [read(of_page[0], columns) for columns in key_columns]
        logits = sum(map(_product_with_transposed, queries, keys)) * given.scale + shown
        new = jnp.maximum(peak, jnp.max(logits, axis=1))
        weights = jnp.exp(logits - new[:, None])
        kept = jnp.exp(peak - new)
        values = keys if stored == 1 else [read(of_page[-1], x) for x in value_columns]
        total = total * kept + jnp.sum(weights, axis=1)
        weights = weights.astype(values[0].dtype)
        out = [o * kept[:, None] + _product(weights, v) for o, v in zip(out, values, strict=True)]
        return new, total, *out

    def add_listed(step: Any, old: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        listed = start + first + jax.lax.div(step, per_page)
        entries = pl.ds(jax.lax.rem(step, per_page) * size.tokens, size.tokens)
        return add(old, pages, ids[listed], entries, hidden[listed, entries][None, :])

    def add_current(step: Any, old: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        shown_of, entries = extra[0], pl.ds(step * size.tokens, size.tokens)
        tokens = shown_of.shape[1]
        if tokens == 1:
            shown = shown_of[reader, 0, entries][None, :]
        else:
            token = jnp.minimum(jax.lax.div(row, rows // tokens), tokens - 1)
            shown = shown_of[reader, token, entries]
        return add(old, extra[1 : 1 + stored], reader, entries, shown)

    def add_group(old: tuple[jax.Array, ...], part_of_group: int) -> tuple[jax.Array, ...]:
        """The softmax with a part of what the slot's group has computed."""
        group_of, member_of, group_sizes, *softmax = extra[1 + stored :]
        groups = group_sizes.shape[0]
        known, group = group_of[reader] < groups, jnp.minimum(group_of[reader], groups - 1)
        begin, end = of_part(group_sizes[group], given.before or 1, part_of_group)
        here = is_row & known & (end > begin) & (part == 0)
        of = member_of[reader] * rows + first_row

        def load(ref: Any, other: float, columns: Any = None) -> jax.Array:
            mask = here if columns is None else here[:, None]
            its_rows = rows_at(ref, jnp.int32(part_of_group), group, of=of, columns=columns)
            return triton.load(its_rows, mask=mask, other=other)

        peak, total, *out = old
        other = load(softmax[0], _MASKED)
        new = jnp.maximum(peak, other)
        kept, added = jnp.exp(peak - new), jnp.exp(other - new)
        total = total * kept + load(softmax[1], 0.0) * added
        out = [
            o * kept[:, None] + load(softmax[2], 0.0, columns) * added[:, None]
            for o, columns in zip(out, value_columns, strict=True)
        ]
        return new, total, *out

    zeros = [jnp.zeros((size.rows, columns.size), jnp.float32) for columns in value_columns]
    none = (jnp.full(size.rows, _MASKED, jnp.float32), jnp.zeros(size.rows, jnp.float32), *zeros)
    softmax = jax.lax.fori_loop(0, (last - first) * per_page, add_listed, none)
    writes = last > first
    if given.before is not None:
        turns = (part == parts - 1).astype(jnp.int32) * jnp.int32(per_page)
        softmax = jax.lax.fori_loop(jnp.int32(0), turns, add_current, softmax)
        for part_of_group in range(given.before):
            softmax = add_group(softmax, part_of_group)
        writes = part >= 0

    @pl.when(writes)
    def _() -> None:
        peak, total, *out = softmax
        for ref, values in zip(results, (peak, total), strict=False):
            triton.store(rows_at(ref, part, reader), values, mask=is_row)
        for columns, each in zip(value_columns, out, strict=True):
            of_columns = rows_at(results[2], part, reader, columns=columns)
            triton.store(of_columns, each, mask=is_row[:, None])


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    dimensions = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _product_with_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
