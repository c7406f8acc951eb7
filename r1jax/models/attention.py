"""Causal attention over whole rows (training, prefill), chosen by backend, and over a cache.

All backends compute the same function: token t attends to the tokens s <= t of its segment;
segment 0 is padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from r1jax.models import cudnn_attention, flash_attention_gpu
from r1jax.models.config import AttentionKernel, Execution
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite: a fully masked (padding) row must give numbers, not NaN
_QUERY_CHUNK = 1024  # rows longer than this are attended in blocks of queries
_SPLASH_BLOCK = 512  # tokens; the default of MaxText and axlearn
_ATTENTION = ("batch", None, "attention_heads", None)  # queries, keys and values of whole rows


def row_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch time kv_heads head_dim"],
    v: Float[Array, "batch time kv_heads value_dim"],
    segment_ids: Int[Array, "batch time"],
    execution: Execution,
    layout: Layout,
    prompt_of: Bool[Array, "batch samples prompt_time"] | None = None,
) -> Float[Array, "batch time heads value_dim"]:
    """Attend within each row.

    Args:
      k, v: heads is a multiple of kv_heads, and value_dim at most head_dim.
      segment_ids: equal ids, which are neighbours, attend to each other; 0 is padding, which may
        be anywhere.
      prompt_of: as of `TokenRows`.

    Returns:
      Undefined (but finite) where segment_ids is 0.

    Raises:
      ValueError: samples share a prompt, or the arrays are of a kind, with a kernel that cannot do
        it.
    """
    repeat = head_repeats(q.shape[2], k.shape[2], layout)
    if repeat > 1:
        # Replicated first: keys are small, and the compiler cannot split a repeated head.
        k, v = (layout.constrain(x, ("batch", None, None, None)) for x in (k, v))
        k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    # Where rows are split over time, this is an all-to-all from parts of rows to heads.
    q, k, v = (layout.constrain(x, _ATTENTION) for x in (q, k, v))
    if prompt_of is not None:
        if execution.attention != "xla":
            raise ValueError(
                f"attention = {execution.attention!r}: samples that share a prompt's tokens need "
                "'xla'; give each sample its prompt"
            )
        out = _shared_prompts(q, k, v, segment_ids, prompt_of)
    elif execution.attention == "xla":
        out = _xla(q, k, v, segment_ids)
    else:
        cudnn = functools.partial(_cudnn, device=layout.mesh.devices.flat[0])
        kernels: dict[AttentionKernel, _Kernel] = {
            "splash": _splash,
            "flash": _flash,
            "flash_packed": _flash_packed,
            "cudnn": cudnn,
        }
        out = _per_device(kernels[execution.attention], layout)(q, k, v, segment_ids)
    return layout.constrain(out, ("batch", "time", "heads", None))


def head_repeats(heads: int, kv_heads: int, layout: Layout) -> int:
    """How often key heads are repeated so that they divide over the devices that split the heads.

    Raises:
      ValueError: not even the query heads divide.
    """
    shards = layout.shards("attention_heads")
    if heads % math.lcm(shards, kv_heads):
        fits = [n for n in range(1, heads + 1) if heads % math.lcm(n, kv_heads) == 0]
        raise ValueError(
            f"num_attention_heads = {heads}, num_key_value_heads = {kv_heads}: attention's heads "
            f"do not divide by {shards}, the size of mesh axes "
            f"{dict(layout.rules)['attention_heads']}; {', '.join(map(str, fits))} would do"
        )
    return math.lcm(shards, kv_heads) // kv_heads


def choose_attention(requested: Literal["auto"] | AttentionKernel, backend: str) -> AttentionKernel:
    """`auto` becomes the kernel of the backend; an impossible choice is refused.

    Args:
      backend: `cpu`, `gpu` or `tpu`.
    """
    if requested == "auto":
        kernels: dict[str, AttentionKernel] = {"tpu": "splash", "gpu": "flash"}
        return kernels.get(backend, "xla")
    needed = backend if requested == "xla" else "tpu" if requested == "splash" else "gpu"
    if needed != backend:
        raise ValueError(
            f"model.attention = {requested!r} needs a {needed}, this is a {backend}; "
            "use auto or xla"
        )
    return requested


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
    batch, time, heads, head_dim = q.shape
    if time <= _QUERY_CHUNK:
        return _attend_block(q, k, v, segment_ids, segment_ids, jnp.int32(0))
    # Blocks of queries, each recomputed in the backward pass: memory stays linear in time.
    padded = -(-time // _QUERY_CHUNK) * _QUERY_CHUNK
    blocks = padded // _QUERY_CHUNK
    q = jnp.pad(q, ((0, 0), (0, padded - time), (0, 0), (0, 0)))
    query_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - time)))
    q = q.reshape(batch, blocks, _QUERY_CHUNK, heads, head_dim).swapaxes(0, 1)
    query_ids = query_ids.reshape(batch, blocks, _QUERY_CHUNK).swapaxes(0, 1)

    @jax.checkpoint
    def block(_: None, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        queries, ids, index = xs
        return None, _attend_block(queries, k, v, ids, segment_ids, index * _QUERY_CHUNK)

    _, out = jax.lax.scan(block, None, (q, query_ids, jnp.arange(blocks, dtype=jnp.int32)))
    return out.swapaxes(0, 1).reshape(batch, padded, heads, v.shape[-1])[:, :time]


def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_ids: jax.Array,
    key_ids: jax.Array,
    offset: jax.Array,
) -> jax.Array:
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    # The query heads of one key head are more rows of the same matrix: [b, h, g * q, d] x [b, h, k,
    # d] is half the matrices, twice as high, of a product for every query head.
    q = (q / math.sqrt(head_dim)).astype(q.dtype)
    q = q.reshape(batch, queries, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, -1, head_dim)
    logits = jnp.einsum("bhnd,bkhd->bhnk", q, k, preferred_element_type=jnp.float32)
    steps = jnp.arange(queries, dtype=jnp.int32) + offset
    causal = steps[:, None] >= jnp.arange(keys, dtype=jnp.int32)[None, :]
    visible = causal & (query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids != 0)[:, None, :]
    # Added, not selected: the gradient then does not need the mask.
    hidden = jnp.where(visible, 0.0, _MASKED)[:, None, None]
    logits = logits.reshape(batch, kv_heads, -1, queries, keys) + hidden
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    # Dividing the sums by the total weight is less work than dividing every weight.
    total = jnp.sum(weights, axis=-1)[..., None]
    weights = weights.reshape(batch, kv_heads, -1, keys).astype(v.dtype)
    out = jnp.einsum("bhnk,bkhd->bhnd", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, -1, queries, v.shape[-1]) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, -1).astype(v.dtype)


def _shared_prompts(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, prompt_of: jax.Array
) -> jax.Array:
    """As `_xla`; samples attend to their segment and to the prompt at the row's beginning."""
    batch, samples, start = prompt_of.shape
    heads, head_dim, kv_heads = q.shape[2], q.shape[3], k.shape[2]
    prompt_ids = segment_ids[:, :start]
    of_prompt = _attend_block(
        q[:, :start], k[:, :start], v[:, :start], prompt_ids, prompt_ids, jnp.int32(0)
    )
    # [batch, kv_heads, samples, query heads of a key head x time, head_dim]: a product of all the
    # samples' queries with the prompt's keys, and one of each sample's with its keys.
    q = (q[:, start:] / math.sqrt(head_dim)).astype(q.dtype)
    q = q.reshape(batch, samples, -1, kv_heads, heads // kv_heads, head_dim)
    time = q.shape[2]
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(batch, kv_heads, samples, -1, head_dim)
    new_k, new_v = (
        x[:, start:].reshape(batch, samples, time, kv_heads, -1).transpose(0, 3, 1, 2, 4)
        for x in (k, v)
    )
    ids = segment_ids[:, start:].reshape(batch, samples, time)
    steps = jnp.arange(time, dtype=jnp.int32)
    visible = (ids[..., :, None] == ids[..., None, :]) & (ids != 0)[..., None, :]
    visible &= steps[:, None] >= steps[None, :]
    by_query = (*q.shape[:3], heads // kv_heads, time)

    def masked(logits: jax.Array, visible: jax.Array) -> jax.Array:
        hidden = jnp.where(visible, 0.0, _MASKED)
        return logits.reshape(*by_query, -1) + hidden[:, None, :, None]

    new = jnp.einsum("bhsnd,bhskd->bhsnk", q, new_k, preferred_element_type=jnp.float32)
    old = jnp.einsum("bhsnd,bkhd->bhsnk", q, k[:, :start], preferred_element_type=jnp.float32)
    new, old = masked(new, visible), masked(old, prompt_of[:, :, None])
    peak = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (new, old)))
    new, old = (jnp.exp(x - jax.lax.stop_gradient(peak)) for x in (new, old))
    total = (jnp.sum(new, axis=-1) + jnp.sum(old, axis=-1))[..., None]
    new, old = (x.reshape(*q.shape[:4], -1).astype(v.dtype) for x in (new, old))
    out = jnp.einsum("bhsnk,bhskd->bhsnd", new, new_v, preferred_element_type=jnp.float32)
    out += jnp.einsum("bhsnk,bkhd->bhsnd", old, v[:, :start], preferred_element_type=jnp.float32)
    out = out.reshape(*by_query, -1) / total
    out = out.transpose(0, 2, 4, 1, 3, 5).reshape(batch, samples * time, heads, -1)
    return jnp.concatenate([of_prompt, out.astype(v.dtype)], axis=1)


_Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _per_device(function: _Kernel, layout: Layout) -> _Kernel:
    """Run a kernel on each device's rows and heads: kernels do not know meshes."""
    if layout.mesh.size == 1:
        return function
    heads, rows = layout.spec(_ATTENTION), layout.spec(("batch", None))
    return jax.shard_map(
        function,
        mesh=layout.mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )


def splash_blocks(time: int) -> tuple[int, int]:
    """Tokens of a block of splash attention, and of a row padded to whole blocks.

    The fewest blocks of at most 512 tokens, and then the smallest that TPUs tile: small blocks cost
    a step each whatever they hold, and large ones compute more beside the diagonal.
    """
    blocks = -(-time // _SPLASH_BLOCK)
    block = -(-time // (128 * blocks)) * 128
    return block, blocks * block


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """Pallas splash attention (TPU); time and head sizes are padded to what the kernel tiles.

    A key head is read where it is by all query heads that share it. (So does the kernel's
    multi-query form, mapped over the key heads: it has the same steps, and reads the same blocks.)
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    time, heads, head_dim = q.shape[1:]
    value_dim = v.shape[-1]
    block, padded = splash_blocks(time)
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, padded - time), (0, 0), (0, -x.shape[-1] % 128))).swapaxes(1, 2)
        for x in (q / math.sqrt(head_dim), k, v)
    )
    ids = jnp.pad(ids, ((0, 0), (0, padded - time)))
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))
    return out.swapaxes(1, 2)[:, :time, :, :value_dim]


def _flash(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """JAX's Pallas flash attention (GPU, Triton), which JAX 0.11 deprecates: keys are repeated."""
    from jax.experimental.pallas.ops.gpu import attention as flash

    time, heads, head_dim = q.shape[1:]
    value_dim = v.shape[-1]
    padded = -(-time // 128) * 128
    repeat = heads // k.shape[2]
    k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, head_dim - value_dim),))  # the kernel has one head size
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - time), (0, 0), (0, 0))) for x in (q, k, v))
    ids = jnp.pad(ids, ((0, 0), (0, padded - time)))
    kernel = functools.partial(flash.mha, sm_scale=1 / math.sqrt(head_dim), causal=True)
    return kernel(q, k, v, ids)[:, :time, :, :value_dim]


def _flash_packed(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
    """This package's (GPU, Triton)."""
    return flash_attention_gpu.flash_attention(q, k, v, ids)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, *, device: jax.Device
) -> jax.Array:
    """cuDNN (GPU), which has one offset for keys and values: their heads are of one size."""
    cudnn_attention.check(q, v, device)
    value_dim = v.shape[-1]
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, q.shape[-1] - value_dim),))
    return cudnn_attention.packed_attention(q, k, v, ids, _flash)[..., :value_dim]


def cached_attention(
    q: Float[Array, "batch samples tokens heads head_dim"],
    keys: tuple[jax.Array, jax.Array],
    values: tuple[jax.Array, jax.Array],
    prompt_lengths: Int[Array, " batch"],
    visible: Bool[Array, "#batch #samples tokens capacity"],
) -> Float[Array, "batch samples tokens heads head_dim"]:
    """New tokens of each sample attend to its prompt and to the tokens sampled so far.

    The prompt's keys and values exist once and are shared by the prompt's samples.

    Args:
      keys, values: those of the prompts [batch, kv_heads, prompt_time, head_dim], padded on the
        right, and of the new tokens [batch, samples, kv_heads, capacity, head_dim].
      visible: which of the new tokens each attends to.
    """
    batch, samples, tokens, heads, head_dim = q.shape
    kv_heads, prompt_time = keys[0].shape[1:3]
    q = q.reshape(batch, samples, tokens, kv_heads, heads // kv_heads, head_dim)
    old = jnp.einsum("bsthgd,bhkd->bshtgk", q, keys[0], preferred_element_type=jnp.float32)
    new = jnp.einsum("bsthgd,bshkd->bshtgk", q, keys[1], preferred_element_type=jnp.float32)
    inside = jnp.arange(prompt_time)[None, :] < prompt_lengths[:, None]
    old = jnp.where(inside[:, None, None, None, None], old, _MASKED)
    new = jnp.where(visible[:, :, None, :, None], new, _MASKED)
    logits = jnp.concatenate([old, new], axis=-1) / math.sqrt(head_dim)
    weights = jax.nn.softmax(logits, axis=-1).astype(values[1].dtype)
    old, new = weights[..., :prompt_time], weights[..., prompt_time:]
    out = jnp.einsum("bshtgk,bhkd->bsthgd", old, values[0])
    out = out + jnp.einsum("bshtgk,bshkd->bsthgd", new, values[1])
    return out.reshape(batch, samples, tokens, heads, head_dim)
