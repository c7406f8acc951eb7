"""Attention of a decode step to pages: the platform's kernel, XLA, and reading each page once.

Random numbers in the shape of Qwen2.5-1.5B (12 heads, 2 of keys, of 128 values), or with --latents
of DeepSeek-V3's (128 heads, a latent of 512 + 64); one new token a slot, eight slots of a prompt of
--prompt tokens, samples' lengths lognormal around --mean. A rate counts a prompt's pages once. A
call goes through all layers; the least time of --repeats calls counts. Kernels of a GPU were not
measured so far. Without a GPU or TPU the kernel is interpreted, which takes long: give it a tiny
shape.

    python benchmarks/paged_decode.py --slots 256 1024 --mean 2000 --bandwidth 4800
    python benchmarks/paged_decode.py --slots 3 --mean 40 --prompt 32 --page 16 --repeats 1
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models import Decoder, Execution, LatentAttention, ModelConfig, choose_attention
from r1jax.models.kv_cache import LayerCache, entry_shapes
from r1jax.models.paged_attention import kernel_reads, paged_attention, pages_at_once
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel import PageGroups
from r1jax.models.paged_kernel_gpu import SlotPages, pages_of_slots
from r1jax.sharding import single_device

SAMPLES = 8  # of a prompt
Reads = PageList | PageGroups | SlotPages


def decoder(layers: int, latents: bool) -> Decoder:
    layout = single_device()
    attention = choose_attention("auto", layout.platform)
    execution = Execution(
        compute_dtype=jnp.bfloat16, attention=attention, sampler_attention="kernel"
    )
    if not latents:
        config = ModelConfig("qwen2", 32, 1536, 8960, layers, 12, 2, 128)
        return Decoder(config, execution, layout)
    latent = LatentAttention(1536, 512, 128, 64, 128)
    config = ModelConfig("deepseek_v3", 32, 7168, 18432, layers, 128, 128, 192, latent=latent)
    return Decoder(config, execution, layout)


def page_list(
    slots: int, mean: float, page: int, platform: str, prompt_pages: int
) -> tuple[PageList, int]:
    """Pages of slots in random order in the pool; and how many there are.

    Each SAMPLES slots begin with the same full pages of a prompt; what each has of its own has
    lengths of this mean.
    """
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, slots)).astype(int)
    counts = -(-lengths // page)
    prompts = -(-slots // SAMPLES)
    pool = rng.permutation(prompts * prompt_pages + int(counts.sum()))
    of_prompts = pool[: prompts * prompt_pages].reshape(prompts, prompt_pages)
    own = np.split(pool[prompts * prompt_pages :], np.cumsum(counts)[:-1])
    tables = [np.append(of_prompts[i // SAMPLES], mine) for i, mine in enumerate(own)]
    counts = counts + prompt_pages
    listed = int(counts.sum())
    rest = -listed % pages_at_once(page, platform)
    owners = np.repeat(np.arange(slots), counts)
    filled = np.ones((listed, page), bool)
    filled[np.cumsum(counts) - 1] = np.arange(page) < ((lengths - 1) % page + 1)[:, None]
    reads = PageList(
        jnp.asarray(np.pad(np.concatenate(tables), (0, rest))[None], jnp.int32),
        jnp.asarray(np.pad(owners, (0, rest), constant_values=slots)[None], jnp.int32),
        jnp.asarray(np.pad(filled, ((0, rest), (0, 0)))[None]),
        jnp.int32(listed),
    )
    return reads, len(pool)


def seconds(model: Decoder, q: jax.Array, caches: tuple[LayerCache, LayerCache], reads: Reads,
            repeats: int) -> tuple[float, jax.Array]:  # fmt: skip
    """Of the fastest call, and its result."""

    @jax.jit
    def through_layers(
        q: jax.Array, pages: LayerCache, current: LayerCache, reads: Reads
    ) -> jax.Array:
        page = current[0].shape[-2]
        visible = jnp.broadcast_to(jnp.arange(page) < page // 2, (*q.shape[:3], page))

        def layer(q: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            out = paged_attention(q, pages, current, reads, visible, model, layer=index)
            return (q + out) / 2, None

        return jax.lax.scan(layer, q, jnp.arange(len(pages[0])))[0]

    times = []
    for _ in range(repeats + 1):  # the first compiles
        start = time.perf_counter()
        out = jax.block_until_ready(through_layers(q, *caches, reads))
        times.append(time.perf_counter() - start)
    return min(times[1:]), out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--mean", type=float, default=2000.0, help="tokens of a sample")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt, whole pages")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--page", type=int, default=64, help="tokens of a page")
    parser.add_argument("--latents", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--bandwidth", type=float, help="of the memory, GB/s: H200 4800, H100 3350")
    options = parser.parse_args()
    model = decoder(options.layers, options.latents)
    platform = model.layout.platform
    shapes = entry_shapes(model)
    heads, width = model.config.num_attention_heads, shapes[0][1]
    print(f"{jax.devices()[0].device_kind}, {options.layers} layers, pages of {options.page}")
    for slots in options.slots:
        listed, count = page_list(
            slots, options.mean, options.page, platform, options.prompt // options.page
        )
        keys = iter(jax.random.split(jax.random.key(0), 5))

        def random(*shape: int) -> jax.Array:
            return jax.random.normal(next(keys), shape, jnp.bfloat16)  # noqa: B023

        q = random(1, slots, 1, heads, width)
        pages = tuple(random(options.layers, 1, count, n, options.page, w) for n, w in shapes)
        current = tuple(random(options.layers, 1, slots, n, options.page, w) for n, w in shapes)
        live = count * options.page * sum(n * w for n, w in shapes) * 2
        print(
            f"{slots} slots: {count:,} live pages, {live / 1e6:,.1f} MB a layer; "
            f"{int(listed.count):,} listed"
        )
        reads = kernel_reads(listed, slots, 1, model)
        if isinstance(reads, PageList):
            reads = pages_of_slots(listed, slots, heads // shapes[0][0])
        results = []
        for name, each in ("kernel", reads), ("XLA", listed):
            taken, out = seconds(model, q, (pages, current), each, options.repeats)
            rate = live * options.layers / taken / 1e9
            share = f", {rate / options.bandwidth:.0%} of it" if options.bandwidth else ""
            each_layer = 1e3 * taken / options.layers
            print(f"  {name:6} {each_layer:9.3f} ms a layer, {rate:8.1f} GB/s{share}", flush=True)
            results.append(out.astype(jnp.float32))
        print(f"  largest difference {float(jnp.abs(results[0] - results[1]).max()):.4f}")


if __name__ == "__main__":
    main()
