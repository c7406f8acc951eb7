"""Attention to pages by the TPU's kernel, on four devices and on one; prints the differences."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models import Decoder, Execution, LatentAttention, ModelConfig
from r1jax.models.paged_attention import paged_attention
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel import GroupSize, group_pages
from r1jax.sharding import make_layout

SHARDS, SLOTS, PAGE, WIDTH, HEADS, TOKENS = 2, 3, 4, 16, 4, 2
OWNERS = [[0, 0, 0, 2], [1, 1, 3, 3]]  # 3: behind the last page of the second shard


def difference(latents: bool) -> float:
    kv_heads = 1 if latents else 2
    latent = LatentAttention(None, WIDTH - 4, 4, 4, 8) if latents else None
    heads = (HEADS, HEADS, 8) if latents else (HEADS, kv_heads, WIDTH)
    config = ModelConfig(
        "deepseek_v3" if latents else "qwen2", 32, 32, 32, 1, *heads, latent=latent
    )
    rng = np.random.default_rng(0)

    def numbers(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    arrays = 1 if latents else 2
    q = numbers(SHARDS, SLOTS, TOKENS, HEADS, WIDTH)
    pools = tuple(numbers(1, SHARDS, 8, kv_heads, PAGE, WIDTH) for _ in range(arrays))
    current = tuple(numbers(1, SHARDS, SLOTS, kv_heads, PAGE, WIDTH) for _ in range(arrays))
    visible = jnp.ones((SHARDS, SLOTS, TOKENS, PAGE), bool)
    filled = jnp.asarray(rng.random((SHARDS, 4, PAGE)) < 0.7)
    pages = jnp.asarray([[3, 1, 7, 0], [2, 5, 0, 0]], jnp.int32)
    listed = PageList(pages, jnp.asarray(OWNERS, jnp.int32), filled, jnp.int32(4))
    reads = group_pages(listed, SLOTS, GroupSize(1, 2 * PAGE))

    def attend(axes: dict[str, int], shards: slice) -> np.ndarray:
        count = int(np.prod(list(axes.values())))
        layout = make_layout(axes, devices=jax.devices()[:count])
        model = Decoder(config, Execution(), layout)

        @jax.jit
        def run(q, pools, current, reads, visible):  # type: ignore[no-untyped-def]
            return paged_attention(q, pools, current, reads, visible, model, layer=jnp.int32(0))

        q_, reads_, visible_ = jax.tree.map(lambda x: x[shards], (q, reads, visible))
        stored, filling = (tuple(x[:, shards] for x in stack) for stack in (pools, current))
        return np.asarray(run(q_, stored, filling, reads_, visible_))

    alone = [attend({"data": 1}, slice(i, i + 1)) for i in range(SHARDS)]
    together = attend({"data": 2, "tensor": 2}, slice(None))
    return float(np.abs(together - np.concatenate(alone)).max())


if __name__ == "__main__":
    print(json.dumps([difference(latents) for latents in (False, True)]))
