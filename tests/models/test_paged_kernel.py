"""The TPU's kernel over pages, in JAX's interpreter of kernels, against attention in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.models import Decoder, Execution, ModelConfig, paged_kernel
from r1jax.models.paged_attention import groups_if_kernel, paged_attention
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel import fits, group_pages, vmem_bytes
from r1jax.sharding import Layout, single_device

LAYERS, POOL, PAGE, WIDTH = 2, 24, 4, 16
TABLES = [[3, 7, 1, 9, 11, 2], [], [3, 5], [0], [12, 13, 14, 15, 16, 17, 18, 19, 20]]
SLOTS = len(TABLES)


def page_list(filled: np.ndarray, size: int) -> PageList:
    """Of all tables, padded to `size`."""
    pages = [page for table in TABLES for page in table]
    owners = [slot for slot, table in enumerate(TABLES) for _ in table]
    rest = size - len(pages)
    return PageList(
        jnp.asarray([pages + [0] * rest], jnp.int32),
        jnp.asarray([owners + [SLOTS] * rest], jnp.int32),
        jnp.asarray(np.concatenate([filled[pages], np.zeros((rest, PAGE), bool)])[None]),
        jnp.int32(len(pages)),
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
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(4, 2, 1), (6, 1, 3), (2, 2, 2)])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_slots_attend_to_their_pages_and_their_current_page(
    latent: bool,
    heads: int,
    kv_heads: int,
    tokens: int,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_kernel, "_GROUP_TOKENS", at_once * PAGE)
    rng = np.random.default_rng(heads + tokens)
    model = decoder(heads, kv_heads)

    def numbers(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    arrays = 1 if latent else 2
    pools = [numbers(LAYERS, 1, POOL, kv_heads, PAGE, WIDTH) for _ in range(arrays)]
    current = [numbers(1, SLOTS, kv_heads, PAGE, WIDTH) for _ in range(arrays)]
    q = numbers(1, SLOTS, tokens, heads, WIDTH)
    filled = rng.random((POOL, PAGE)) < 0.7
    filled[3] = False  # a page may hold nothing, as the first of a slot
    visible = rng.random((1, SLOTS, tokens, PAGE)) < 0.5
    visible[..., 0] = True
    reads = page_list(filled, 20)

    def attend(reads: Any, pools: list[np.ndarray], layer: Any) -> jax.Array:
        @jax.jit
        def run(q: jax.Array, pools: Any, current: Any, reads: Any, visible: jax.Array) -> Any:
            return paged_attention(q, pools, current, reads, visible, model, layer=layer)

        return run(q, tuple(map(jnp.asarray, pools)), tuple(current), reads, jnp.asarray(visible))

    groups = group_pages(reads, SLOTS)
    out = attend(groups, pools, jnp.int32(1))
    for slot, table in enumerate(TABLES):
        wanted = in_float64(
            q[0, slot],
            [pool[1, 0, table].swapaxes(1, 2).reshape(-1, kv_heads, WIDTH) for pool in pools],
            [each[0, slot].swapaxes(0, 1) for each in current],
            filled[table].reshape(-1),
            visible[0, slot],
        )
        np.testing.assert_allclose(out[0, slot], wanted, atol=2e-6, err_msg=f"slot {slot}")
    # Of layers that are not stacked; and as XLA computes it.
    apart = [pool[1] for pool in pools]
    np.testing.assert_allclose(attend(groups, apart, None), out, atol=1e-6)
    monkeypatch.setattr("r1jax.models.paged_attention.pages_at_once", lambda *_: 4)
    np.testing.assert_allclose(attend(reads, pools, jnp.int32(1)), out, atol=2e-6)


def test_groups_hold_the_pages_of_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_kernel, "_GROUP_TOKENS", 4 * PAGE)
    filled = np.ones((POOL, PAGE), bool)
    filled[5, 1:] = False
    groups = jax.tree.map(lambda leaf: leaf[0], group_pages(page_list(filled, 20), SLOTS))
    count = int(groups.count)
    assert groups.owners[:count].tolist() == [0, 0, 2, 3, 4, 4, 4]
    assert groups.sizes[:count].tolist() == [4, 2, 2, 1, 4, 4, 1]
    assert groups.starts[:count].tolist() == [0, 4, 6, 8, 9, 13, 17]
    assert not groups.sizes[count:].any()
    # The second group of two pages, of which one holds a token, fills half of its entries.
    seen = (groups.hidden[2, 0] == 0).reshape(4, PAGE)
    assert seen.tolist() == [[True] * 4, [True, False, False, False], [False] * 4, [False] * 4]


def test_no_page_is_read_where_none_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_kernel, "_GROUP_TOKENS", 2 * PAGE)
    reads = PageList(
        jnp.zeros((1, 8), jnp.int32),
        jnp.full((1, 8), SLOTS, jnp.int32),
        jnp.zeros((1, 8, PAGE), bool),
        jnp.int32(0),
    )
    groups = group_pages(reads, SLOTS)
    assert groups.count.tolist() == [0]
    pools = tuple(jnp.full((1, 1, POOL, 1, PAGE, WIDTH), jnp.nan) for _ in range(2))
    part = paged_kernel.paged_softmax(
        jnp.ones((SLOTS, 1, 2, WIDTH)), pools, jnp.int32(0), groups, interpret=True
    )
    assert not part.total.any() and not part.out.any()


def test_the_kernel_is_for_a_tpu_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = page_list(np.ones((POOL, PAGE), bool), 20)
    model = decoder(4, 2)
    assert groups_if_kernel(reads, SLOTS, 1, model) is reads
    monkeypatch.setattr(Layout, "platform", "tpu")
    assert groups_if_kernel(reads, SLOTS, 1, model) is not reads
    assert groups_if_kernel(reads, 100_000, 1, model) is reads
    by_xla = Decoder(model.config, Execution(attention="xla"), model.layout)
    assert groups_if_kernel(reads, SLOTS, 1, by_xla) is reads
    # By hand: 32 slots of 128 query heads of a latent; buffers of two groups, keys = values.
    needed = vmem_bytes(32, 1, 128, (640, 640))
    assert needed == 32 * 128 * (2 * 640 + 4 * 640 + 2 * 512) + 2 * 2 * 2048 * 2 * 640
    assert not fits(needed, "TPU v5") and fits(needed // 2, "TPU v5")
    assert not fits(needed // 2, "TPU v4")
