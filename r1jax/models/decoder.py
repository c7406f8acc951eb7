"""The dense decoder as pure functions: one layer, used by training, prefill and decoding alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.models.attention import cached_attention, row_attention
from r1jax.models.config import Execution, ModelConfig
from r1jax.models.parameters import Params
from r1jax.models.rope import rotate, rotations
from r1jax.sharding import Layout

# Keys and values of all layers: stacked [layers, ...] arrays when layers are scanned, else a tuple
# with one entry per layer.
Cache = Any
_PROMPT_CACHE = ("batch", "kv_heads", None, "head_dim")
_NEW_CACHE = ("batch", "sample", "kv_heads", None, "head_dim")
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Decoder:
    """Everything static about a model: what it is, how and where it is computed. Hashable."""

    config: ModelConfig
    execution: Execution
    layout: Layout


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis, in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)


def project(x: jax.Array, weight: jax.Array, layout: Layout, *, inputs: int = 1) -> jax.Array:
    """x [..., *in] times weight [*in, *out] -> [..., *out]; `inputs` counts the dimensions *in*.

    Computed as one product of two plain matrices: in the backward pass of a product with several
    leading dimensions, XLA's CPU backend transposes whole activations element by element, which
    takes longer than the products themselves. Where time is split over devices the dimensions
    stay apart, because merging two split ones would gather them.
    """
    if layout.shards("time") > 1:
        return jnp.tensordot(x, weight, inputs)
    rows = x.reshape(-1, math.prod(weight.shape[:inputs]))
    out = rows @ weight.reshape(rows.shape[1], -1)
    return out.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])


def _layer(
    x: jax.Array,
    weights: Params,
    cos: jax.Array,
    sin: jax.Array,
    model: Decoder,
    attend: Attend,
) -> tuple[jax.Array, Any]:
    """One pre-norm block on x [..., hidden]; `attend` decides what the queries see."""
    config, layout = model.config, model.layout
    w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), weights)
    y = rms_norm(x, w["attention_norm"], config.rms_norm_eps)
    q, k, v = (project(y, w[name], layout) for name in ("q", "k", "v"))
    if config.qkv_bias:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    if config.qk_norm:
        q = rms_norm(q, w["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, w["k_norm"], config.rms_norm_eps)
    attended, kept = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x = x + project(attended, w["o"], layout, inputs=2)
    y = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
    inner = jax.nn.silu(project(y, w["gate"], layout)) * project(y, w["up"], layout)
    return x + project(inner, w["down"], layout), kept


def unstack_layers(params: Params, model: Decoder) -> Params:
    """Split stacked layer weights into a tuple of layers, unless the layers are scanned.

    Done once outside of a decode loop, so that the loop does not slice weights at every token.
    """
    layers = params["layers"]
    if model.execution.scan_layers or isinstance(layers, tuple):
        return params
    count = model.config.num_hidden_layers
    split = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count))
    return {**params, "layers": split}


def embed(params: Params, tokens: jax.Array, model: Decoder, *, many: bool = True) -> jax.Array:
    """Token ids [...] -> activations [..., hidden] in the compute dtype.

    Args:
      many: the tokens weigh more than the table. What `fsdp` splits of the table then comes to
        the tokens; else the pieces of the few tokens' activations go everywhere.
    """
    table, everywhere = (
        params["embed"].astype(model.execution.compute_dtype),
        model.layout.constrain,
    )
    if many:
        return jnp.take(everywhere(table, ("vocab", None)), tokens, axis=0, mode="clip")
    tokens = everywhere(tokens, (None,) * tokens.ndim)
    return everywhere(jnp.take(table, tokens, axis=0, mode="clip"), (None,) * (tokens.ndim + 1))


def unembedding(params: Params, model: Decoder) -> jax.Array:
    """The output matrix [hidden, vocab] in the compute dtype (the embedding, when tied).

    Raises:
      ValueError: the model has another head.
    """
    if model.config.head != "language":
        raise ValueError(f"a model with head = {model.config.head!r} has no logits")
    matrix = params["embed"].T if model.config.tie_word_embeddings else params["unembed"]
    return matrix.astype(model.execution.compute_dtype)


def logits(params: Params, hidden: jax.Array, model: Decoder) -> jax.Array:
    """Activations [..., hidden] -> float32 logits [..., vocab]."""
    return jnp.matmul(hidden, unembedding(params, model), preferred_element_type=jnp.float32)


def _remat(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    if policy == "none":
        return function
    if policy == "dots":
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(function, policy=saved)
    return jax.checkpoint(function)


def _run_rows(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
    *,
    keep_cache: bool,
) -> tuple[jax.Array, Cache]:
    config, execution, layout = model.config, model.execution, model.layout
    params = unstack_layers(params, model)
    cos, sin = rotations(positions, config)
    activation = ("batch", "time", "activation_embed")
    x = layout.constrain(embed(params, tokens, model), activation)

    def body(x: jax.Array, weights: Params) -> tuple[jax.Array, Any]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            out = row_attention(q, k, v, segment_ids, execution, layout)
            if not keep_cache:
                return out, None
            return out, tuple(layout.constrain(x.swapaxes(1, 2), _PROMPT_CACHE) for x in (k, v))

        x, kept = _layer(x, weights, cos, sin, model, attend)
        return layout.constrain(x, activation), kept

    body = _remat(body, execution.remat)
    if execution.scan_layers:
        x, cache = jax.lax.scan(body, x, params["layers"])
    else:
        kept_layers = []
        for weights in params["layers"]:
            x, kept = body(x, weights)
            kept_layers.append(kept)
        cache = tuple(kept_layers)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), cache


def forward(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
) -> jax.Array:
    """Run whole rows.

    Args:
      tokens: int32 [batch, time].
      positions: int32 [batch, time], counted from 0 within each segment.
      segment_ids: int32 [batch, time]; 0 is padding, several documents may share a row.

    Returns:
      Normalised activations [batch, time, hidden]; `logits`, `token_scores` or `reward_scores`
      read them.
    """
    hidden, _ = _run_rows(params, tokens, positions, segment_ids, model, keep_cache=False)
    return hidden


def prefill(
    params: Params, tokens: jax.Array, lengths: jax.Array, model: Decoder
) -> tuple[jax.Array, Cache]:
    """Read right-padded prompts.

    Args:
      tokens: int32 [batch, prompt_time].
      lengths: int32 [batch], at least 1.

    Returns:
      Activations of each prompt's last token [batch, hidden], and the prompts' keys and values,
      per layer [batch, kv_heads, prompt_time, head_dim].
    """
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment_ids = (steps < lengths[:, None]).astype(jnp.int32)
    hidden, cache = _run_rows(params, tokens, steps, segment_ids, model, keep_cache=True)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, cache


def empty_cache(batch: int, samples: int, capacity: int, model: Decoder) -> Cache:
    """Room for `capacity` new tokens, per layer [batch, samples, kv_heads, capacity, head_dim]."""
    config, dtype = model.config, model.execution.compute_dtype
    shape = (batch, samples, config.num_key_value_heads, capacity, config.head_dim)
    if model.execution.scan_layers:
        stacked = (config.num_hidden_layers, *shape)
        axes = ("layers", *_NEW_CACHE)
        return tuple(model.layout.constrain(jnp.zeros(stacked, dtype), axes) for _ in range(2))
    return tuple(
        tuple(model.layout.constrain(jnp.zeros(shape, dtype), _NEW_CACHE) for _ in range(2))
        for _ in range(config.num_hidden_layers)
    )


def grow_cache(cache: Cache, extra: int) -> Cache:
    """The same cache with room for `extra` more tokens."""

    def grow(leaf: jax.Array) -> jax.Array:
        widths = [(0, 0)] * leaf.ndim
        widths[-2] = (0, extra)
        return jnp.pad(leaf, widths)

    return jax.tree.map(grow, cache)


def decode(
    params: Params,
    tokens: jax.Array,
    prompt_cache: Cache,
    prompt_lengths: jax.Array,
    cache: Cache,
    step: jax.Array,
    model: Decoder,
) -> tuple[jax.Array, Cache]:
    """Read one new token of every sample.

    Args:
      params: as `unstack_layers` returns them.
      tokens: int32 [batch, samples], the step-th new token of each sample.
      prompt_cache: from `prefill`.
      prompt_lengths: int32 [batch].
      cache: from `empty_cache`; entry `step` is filled here.
      step: int32 scalar.

    Returns:
      Activations [batch, samples, hidden] and the cache.
    """
    config = model.config
    positions = jnp.broadcast_to(prompt_lengths[:, None] + step, tokens.shape)
    cos, sin = rotations(positions, config)
    x = model.layout.constrain(
        embed(params, tokens, model, many=False), ("batch", "sample", "activation_embed")
    )

    def run(x: jax.Array, weights: Params, prompt: Any, write: Callable[..., Any]) -> Any:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            kept, new_k, new_v = write(k[..., None, :], v[..., None, :])
            return (
                cached_attention(q, prompt[0], prompt[1], prompt_lengths, new_k, new_v, step),
                kept,
            )

        return _layer(x, weights, cos, sin, model, attend)

    if not model.execution.scan_layers:
        kept_layers = []
        for weights, prompt, entry in zip(params["layers"], prompt_cache, cache, strict=True):

            def write(k: jax.Array, v: jax.Array, entry: Any = entry) -> Any:
                put = jax.lax.dynamic_update_slice_in_dim
                kept = put(entry[0], k, step, axis=3), put(entry[1], v, step, axis=3)
                return kept, *kept

            x, kept = run(x, weights, prompt, write)
            kept_layers.append(kept)
        cache = tuple(kept_layers)
    else:
        # The cache is carried, not scanned over: a scanned-over cache is copied at every token.
        def body(carry: tuple[jax.Array, Cache], xs: Any) -> tuple[tuple[jax.Array, Cache], None]:
            x, (all_k, all_v) = carry
            weights, prompt, index = xs

            def write(k: jax.Array, v: jax.Array) -> Any:
                zero = jnp.int32(0)
                start = (index, zero, zero, zero, step, zero)
                kept = (
                    jax.lax.dynamic_update_slice(all_k, k[None], start),
                    jax.lax.dynamic_update_slice(all_v, v[None], start),
                )
                pick = jax.lax.dynamic_index_in_dim
                return kept, *(pick(leaf, index, keepdims=False) for leaf in kept)

            x, kept = run(x, weights, prompt, write)
            return (x, kept), None

        indices = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        xs = (params["layers"], prompt_cache, indices)
        (x, cache), _ = jax.lax.scan(body, (x, cache), xs)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), cache
