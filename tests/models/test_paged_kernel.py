"""The kernels over pages, in JAX's interpreter of kernels, against attention in float64."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_programs import devices

from r1jax.models import (
    Decoder,
    Execution,
    LatentAttention,
    ModelConfig,
    paged_kernel,
    paged_kernel_gpu,
)
from r1jax.models.paged_attention import kernel_reads, paged_attention
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel import (
    GroupSize,
    KernelShape,
    PageGroups,
    group_pages,
    group_size,
    paged_softmax,
    vmem_bytes,
)
from r1jax.models.paged_kernel_gpu import SlotPages, pages_of_slots, tile
from r1jax.planner.topologies import find_slice
from r1jax.sharding import Layout, single_device

LAYERS, POOL, PAGE, WIDTH = 2, 24, 4, 16
TABLES = [[3, 7, 1, 9, 11, 2], [], [3, 5], [0], [12, 13, 14, 15, 16, 17, 18, 19, 20]]
SLOTS = len(TABLES)


grouped = jax.jit(group_pages, static_argnums=(1, 2))
slotted = jax.jit(pages_of_slots, static_argnums=(1, 2))


def page_list(filled: np.ndarray, size: int) -> PageList:
    """Of all tables, padded to `size`."""
    pages = [page for table in TABLES for page in table]
    owners = [slot for slot, table in enumerate(TABLES) for _ in table]
    rest = size - len(pages)
    return PageList(
        np.asarray([pages + [0] * rest], np.int32),
        np.asarray([owners + [SLOTS] * rest], np.int32),
        np.concatenate([filled[pages], np.zeros((rest, filled.shape[1]), bool)])[None],
        np.int32(len(pages)),
    )


def decoder(heads: int, kv_heads: int) -> Decoder:
    config = ModelConfig("qwen2", 32, 32, 32, LAYERS, heads, kv_heads, WIDTH)
    return Decoder(config, Execution(attention="splash"), single_device())


def in_float64(
    q: np.ndarray, pages: list[np.ndarray], current: list[np.ndarray], seen: Any, visible: Any
) -> np.ndarray:
    """[tokens, heads, width] of one slot, whose keys are [entries, kv_heads, width]."""
    keys, values = (
        np.concatenate([stored, new]).astype(np.float64)
        for stored, new in ((pages[0], current[0]), (pages[-1], current[-1]))
    )
    out = np.zeros((*q.shape[:2], values.shape[-1]))
    for token, head in np.ndindex(*q.shape[:2]):
        of = head * keys.shape[1] // q.shape[1]
        logits = keys[:, of] @ q[token, head] / np.sqrt(q.shape[-1])
        logits = np.where(np.concatenate([seen, visible[token]]), logits, -np.inf)
        weights = np.exp(logits - logits.max())
        out[token, head] = weights @ values[:, of] / weights.sum()
    return out


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "size"),
    [
        (4, 2, 1, GroupSize(2, 4 * PAGE)),
        (8, 4, 1, GroupSize(2, 2 * PAGE)),
        (6, 1, 3, GroupSize(1, PAGE)),
        (20, 1, 1, GroupSize(1, 3 * PAGE)),
        # Programs of a GPU: more of them than pages; a few; and one for each slot and head.
        (4, 2, 1, 1000),
        (6, 1, 3, 2 * SLOTS),
        (6, 3, 2, 0),
    ],
)
def test_slots_attend_to_their_pages_and_their_current_page(
    latent: bool,
    heads: int,
    kv_heads: int,
    tokens: int,
    size: GroupSize | int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(heads + tokens)
    model = decoder(heads, kv_heads)
    # What a GPU multiplies are powers of two of 16 at least: 48 is 32 and 16.
    page, width = (PAGE, WIDTH) if isinstance(size, GroupSize) else (32, 48)

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    arrays = 1 if latent else 2
    pools = [numbers(LAYERS, 1, POOL, kv_heads, page, width) for _ in range(arrays)]
    current = [numbers(LAYERS, 1, SLOTS, kv_heads, page, width) for _ in range(arrays)]
    q = numbers(1, SLOTS, tokens, heads, width)
    filled = rng.random((POOL, page)) < 0.7
    filled[3] = False  # a page may hold nothing, as the first of a slot
    visible = rng.random((1, SLOTS, tokens, page)) < 0.5
    visible[..., 0] = True
    reads = page_list(filled, 20)

    def attend(reads: Any, stored: tuple[Any, Any], layer: Any) -> jax.Array:
        @jax.jit
        def run(q: jax.Array, pools: Any, current: Any, reads: Any, visible: jax.Array) -> Any:
            return paged_attention(q, pools, current, reads, visible, model, layer=layer)

        return run(q, *(tuple(map(jnp.asarray, x)) for x in stored), reads, jnp.asarray(visible))

    for_kernel: PageGroups | SlotPages
    if isinstance(size, GroupSize):
        for_kernel = grouped(reads, SLOTS, size)
    else:
        monkeypatch.setattr(paged_kernel_gpu, "_PROGRAMS", size)
        for_kernel = slotted(reads, SLOTS, tokens * heads // kv_heads)
    out = attend(for_kernel, (pools, current), jnp.int32(1))
    for slot, table in enumerate(TABLES):
        wanted = in_float64(
            q[0, slot],
            [pool[1, 0, table].swapaxes(1, 2).reshape(-1, kv_heads, width) for pool in pools],
            [each[1, 0, slot].swapaxes(0, 1) for each in current],
            filled[table].reshape(-1),
            visible[0, slot],
        )
        np.testing.assert_allclose(out[0, slot], wanted, atol=2e-6, err_msg=f"slot {slot}")
    # Of layers that are not stacked; and as XLA computes it.
    apart = [pool[1] for pool in pools], [each[1] for each in current]
    np.testing.assert_allclose(attend(for_kernel, apart, None), out, atol=1e-6)
    monkeypatch.setattr("r1jax.models.paged_attention.pages_at_once", lambda *_: 4)
    np.testing.assert_allclose(attend(reads, (pools, current), jnp.int32(1)), out, atol=2e-6)


# Slots 0, 2, 5 and 7 have two pages of a prompt in common, and two of them a third; slots 1 and 6
# another one's only page, after which slot 6 has nothing.
SHARING = [[4, 9, 1, 3], [7, 2], [4, 9, 5], [], [6, 8], [4, 9, 1, 0], [7], [4, 9], [11]]


@pytest.mark.parametrize("rows", [16, 20, 64])
def test_slots_read_the_pages_of_their_prompt_together(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to four slots, or three, or none."""
    rng, page, width, slots = np.random.default_rng(rows), 16, 16, len(SHARING)
    model, tokens = decoder(2 * rows, 2), 1
    filled = rng.random((12, page)) < 0.7
    pages = [page for table in SHARING for page in table]
    owners = [slot for slot, table in enumerate(SHARING) for _ in table]
    rest = 24 - len(pages)
    reads = PageList(
        np.asarray([pages + [0] * rest], np.int32),
        np.asarray([owners + [slots] * rest], np.int32),
        np.concatenate([filled[pages], np.zeros((rest, page), bool)])[None],
        np.int32(len(pages)),
    )
    by_slot = slotted(reads, slots, rows)
    if rows == 64:
        assert by_slot.groups is None
        together: list[list[int]] = []
    else:
        groups = jax.device_get(by_slot.groups)
        listed = zip(groups.members[0], *(x[0] for x in groups.lists), strict=True)
        found = [(*sorted(m[m < slots]), *pages[start : start + n]) for m, start, n in listed]
        together = [each for each in found if each]
        four = [(0, 2, 5, 7, 4, 9)] if rows == 16 else [(0, 2, 5, 4, 9)]
        assert sorted(together) == sorted([*four, (1, 6, 7)])
    # Every page of a slot is read once, by the slot or by its group.
    own = np.asarray(by_slot.lists.sizes[0])
    shared = {0: 2, 2: 2, 5: 2, 1: 1, 6: 1} | ({7: 2} if rows == 16 else {})
    if rows == 64:
        shared = {}
    assert own.tolist() == [len(table) - shared.get(i, 0) for i, table in enumerate(SHARING)]

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    pools = [numbers(LAYERS, 1, 12, 2, page, width) for _ in range(2)]
    current = [numbers(LAYERS, 1, slots, 2, page, width) for _ in range(2)]
    q = numbers(1, slots, tokens, 2 * rows, width)
    visible = rng.random((1, slots, tokens, page)) < 0.5
    visible[..., 0] = True

    @jax.jit
    def run(q: Any, pools: Any, current: Any, reads: Any, visible: Any) -> jax.Array:
        return paged_attention(q, pools, current, reads, visible, model, layer=jnp.int32(1))

    for programs in (0, 1000):  # one for each slot and head; more of them than pages
        monkeypatch.setattr(paged_kernel_gpu, "_PROGRAMS", programs)
        run.clear_cache()
        out = run(q, tuple(pools), tuple(current), by_slot, visible)
        for slot, table in enumerate(SHARING):
            wanted = in_float64(
                q[0, slot],
                [pool[1, 0, table].swapaxes(1, 2).reshape(-1, 2, width) for pool in pools],
                [each[1, 0, slot].swapaxes(0, 1) for each in current],
                filled[table].reshape(-1),
                visible[0, slot],
            )
            np.testing.assert_allclose(out[0, slot], wanted, atol=2e-6, err_msg=f"slot {slot}")


def test_groups_hold_the_pages_of_one_slot() -> None:
    filled = np.ones((POOL, PAGE), bool)
    filled[5, 1:] = False
    of_shards = grouped(page_list(filled, 20), SLOTS, GroupSize(1, 4 * PAGE))
    groups = jax.tree.map(lambda leaf: leaf[0], of_shards)
    count = int(groups.count)
    assert groups.owners[:count].tolist() == [0, 0, 2, 3, 4, 4, 4]
    assert groups.sizes[:count].tolist() == [4, 2, 2, 1, 4, 4, 1]
    assert groups.starts[:count].tolist() == [0, 4, 6, 8, 9, 13, 17]
    assert not groups.sizes[count:].any()
    assert groups.with_pages.tolist() == [True, False, True, True, True]
    # The second group of two pages, of which one holds a token, fills half of its entries.
    seen = (groups.hidden[2, 0] == 0).reshape(4, PAGE)
    assert seen.tolist() == [[True] * 4, [True, False, False, False], [False] * 4, [False] * 4]


def test_no_page_is_read_where_none_is_listed() -> None:
    reads = PageList(
        np.zeros((1, 8), np.int32),
        np.full((1, 8), SLOTS, np.int32),
        np.zeros((1, 8, PAGE), bool),
        np.int32(0),
    )
    groups = grouped(reads, SLOTS, GroupSize(1, 2 * PAGE))
    assert groups.count.tolist() == [0]
    pools = tuple(np.full((1, 1, POOL, 2, PAGE, WIDTH), np.nan, np.float32) for _ in range(2))
    softmax = jax.jit(functools.partial(paged_softmax, interpret=True))
    queries = np.ones((SLOTS, 2, 2, WIDTH), np.float32)
    part = jax.device_get(softmax(queries, pools, np.int32(0), groups))
    assert not part.total.any() and not part.out.any()


def kind_of_reads(model: Decoder, page: int = PAGE, slots: int = SLOTS, tokens: int = 1) -> type:
    reads = jax.eval_shape(lambda: page_list(np.ones((POOL, page), bool), 20))
    return type(jax.eval_shape(lambda reads: kernel_reads(reads, slots, tokens, model), reads))


def test_the_kernel_is_for_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(4, 2)
    assert kind_of_reads(model) is PageList
    monkeypatch.setattr(Layout, "platform", "tpu")
    assert kind_of_reads(model) is PageGroups
    # The number of slots does not matter; that of a slot's queries does.
    assert kind_of_reads(model, slots=100_000) is PageGroups
    assert kind_of_reads(model, tokens=100_000) is PageList
    for choice in (Execution(attention="xla"), Execution(sampler_attention="xla")):
        assert kind_of_reads(replace(model, execution=choice)) is PageList


def test_a_gpu_has_a_kernel_for_those_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(4, 2)
    monkeypatch.setattr(Layout, "platform", "gpu")
    assert kind_of_reads(model, 16) is PageList
    model = replace(model, execution=replace(model.execution, sampler_attention="kernel"))
    assert kind_of_reads(model, 16) is SlotPages
    assert kind_of_reads(model, PAGE) is PageList
    by_xla = Decoder(model.config, Execution(attention="xla"), model.layout)
    assert kind_of_reads(by_xla, 16) is PageList


def test_tiles_are_what_a_multiprocessor_holds() -> None:
    assert tile(KernelShape(2, 6, (128, 128)), 64) == (16, 64)
    assert tile(KernelShape(2, 100, (128, 128)), 64) == (128, 64)
    assert tile(KernelShape(1, 128, (576,)), 64) == (32, 32)
    assert tile(KernelShape(2, 6, (128, 128), 4), 64) == (16, 32)
    assert tile(KernelShape(2, 6, (128, 128)), 48) == (16, 16)
    assert tile(KernelShape(2, 6, (128, 128)), 24) is None
    assert tile(KernelShape(2, 6, (120, 120)), 64) is None


def test_deepseek_v3_is_read_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 heads of a latent of 512 + 64, though no device splits the heads."""
    monkeypatch.setattr(Layout, "platform", "tpu")
    latent = LatentAttention(None, 512, 128, 64, 128)
    config = ModelConfig("deepseek_v3", 32, 32, 32, 1, 128, 128, 192, latent=latent)
    model = Decoder(config, Execution(attention="splash"), single_device())
    assert kind_of_reads(model) is PageGroups


def test_groups_are_as_large_as_vmem_allows() -> None:
    # By hand: 128 query heads of a latent, padded to 640.
    latents = KernelShape(1, 128, (640,))
    size = GroupSize(1, 2048)
    pages, hidden, queries = 2048 * 640 * 2, 8 * 2048 * 4, 128 * 640 * 2
    results = 128 * (640 + 256) * 4
    computed = 2048 * 1280 * 2 + 128 * (2048 * 10 + 2 * 640 * 4)
    needed = 2 * (pages + hidden + queries + results) + computed
    assert vmem_bytes(latents, size) == needed
    assert group_size(latents, 64, "TPU v5") == size
    assert group_size(latents, 64, "TPU v4") == GroupSize(1, 512)
    for kv_heads, heads in ((2, 2), (8, 8), (12, 6), (13, 1), (128, 8)):
        for rows in (1, 16, 64):
            shape = KernelShape(kv_heads, rows, (128, 128))
            fitting = group_size(shape, 64, "TPU v5")
            assert fitting is not None and fitting.heads == heads
            assert vmem_bytes(shape, fitting) <= 24 * 2**20
    # A group is a page at least; in float32 it takes twice the memory.
    assert group_size(latents, 3072, "TPU v5") == GroupSize(1, 3072)
    assert group_size(latents, 3072, "TPU v4") is None
    assert group_size(KernelShape(1, 128, (640,), 4), 64, "TPU v5") == GroupSize(1, 1024)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler")
@pytest.mark.parametrize(
    ("topology", "shape"),
    [
        ("v5e:2x2", KernelShape(1, 128, (640,))),
        ("v5p:2x2x1", KernelShape(1, 128, (640,))),
        ("v5p:2x2x1", KernelShape(16, 6, (128, 128))),
    ],
)
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # of a TPU
def test_a_slice_compiles_it_with_the_vmem_that_is_estimated(
    topology: str, shape: KernelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = find_slice(topology).devices[0]
    placed = jax.sharding.SingleDeviceSharding(device)
    size = group_size(shape, 64, device.device_kind)
    assert size is not None
    needed = vmem_bytes(shape, size)
    # It is given a quarter more.
    monkeypatch.setattr(paged_kernel, "vmem_bytes", lambda *_: needed * 4 // 5)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    def attend(q: jax.Array, pools: Any, reads: PageList, layer: jax.Array) -> Any:
        return paged_softmax(q, pools, layer, group_pages(reads, SLOTS, size))

    numbers, listed = jnp.bfloat16, (1, 256)
    q = array(numbers, SLOTS, shape.kv_heads, shape.rows, shape.widths[0])
    pools = tuple(array(numbers, 2, 1, 99, shape.kv_heads, 64, width) for width in shape.widths)
    reads = PageList(
        array(jnp.int32, *listed),
        array(jnp.int32, *listed),
        array(jnp.bool_, *listed, 64),
        array(jnp.int32),
    )
    program = jax.jit(attend).lower(q, pools, reads, array(jnp.int32)).compile()
    assert paged_kernel.PAGE_KERNEL in program.as_text()


@pytest.mark.slow  # compiles for two meshes
def test_devices_read_the_pages_of_their_slots_for_their_heads() -> None:
    script = str(Path(__file__).parents[1] / "pages_on_a_mesh.py")
    done = forked.run(script, env=os.environ | devices(4))
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(json.loads(done.stdout)) < 1e-5
