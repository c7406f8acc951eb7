"""The decoder as pure functions: one layer, used by training, prefill and decoding alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.models.attention import cached_attention, row_attention
from r1jax.models.config import Execution, ModelConfig
from r1jax.models.experts import Routing, mixture_of_experts
from r1jax.models.latent_attention import absorbed_attention, expand, queries_and_latents
from r1jax.models.parameters import Params
from r1jax.models.primitives import project, rms_norm, swiglu
from r1jax.models.rope import rotate, rotations
from r1jax.sharding import Axes, Layout

# What all layers remember (`ModelConfig.cached`: keys and values, or latents). For each stack of
# layers, stacked [layers, ...] arrays when layers are scanned, else a tuple with one entry per
# layer.
Cache = dict[str, Any]
# Given the queries, what a layer remembers of the tokens that it reads, [..., heads, width] each,
# and its weights: what the queries find, and what is passed on.
Attend = Callable[[jax.Array, tuple[jax.Array, ...], Params], tuple[jax.Array, Any]]
# The experts of a layer, given what they read and the layer's weights.
Mix = Callable[[jax.Array, Params], tuple[jax.Array, Routing]]
# Stack of layers with experts -> what their routers did, [layers, ...].
Routings = dict[str, Routing]


@dataclass(frozen=True)
class Decoder:
    """Everything static about a model: what it is, how and where it is computed. Hashable."""

    config: ModelConfig
    execution: Execution
    layout: Layout


def cache_axes(config: ModelConfig, *, new: bool) -> Axes:
    """Logical axes of each array that a layer remembers: of the prompts, or of the new tokens."""
    # A latent has no heads that devices could share.
    heads, width = (None, None) if config.latent is not None else ("kv_heads", "head_dim")
    return ("batch", *(("sample",) if new else ()), heads, None, width)


def _layer(
    x: jax.Array,
    weights: Params,
    cos: jax.Array,
    sin: jax.Array,
    model: Decoder,
    attend: Attend,
    mix: Mix,
) -> tuple[jax.Array, Any, Routing | None]:
    """One pre-norm block on x [..., hidden]; `attend` decides what the queries see.

    Returns:
      The block's value, what `attend` passes on, and what a router did; None without experts.
    """
    config, layout = model.config, model.layout
    w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), weights)
    y = rms_norm(x, w["attention_norm"], config.rms_norm_eps)
    if config.latent is not None:
        q, *kept = queries_and_latents(y, w, cos, sin, config, layout)
    else:
        q, *kept = _queries_keys_values(y, w, cos, sin, config, layout)
    attended, cache = attend(q, tuple(kept), w)
    x = x + project(attended, w["o"], layout, inputs=2)
    y = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
    if config.experts is not None and "router" in w:
        if "router_bias" in w:
            # It decides between experts that may be close: it is not rounded.
            w["router_bias"] = weights["router_bias"]
        found, routing = mix(y, w)
        return x + found, cache, routing
    return x + swiglu(y, w["gate"], w["up"], w["down"], layout), cache, None


def _queries_keys_values(
    y: jax.Array, w: Params, cos: jax.Array, sin: jax.Array, config: ModelConfig, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q, k, v = (project(y, w[name], layout) for name in ("q", "k", "v"))
    if config.qkv_bias:
        q, k, v = q + w["q_bias"], k + w["k_bias"], v + w["v_bias"]
    if config.qk_norm:
        q = rms_norm(q, w["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, w["k_norm"], config.rms_norm_eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def unstack_layers(params: Params, model: Decoder) -> Params:
    """Split stacked layer weights into a tuple of layers, unless the layers are scanned.

    Done once outside of a decode loop, so that the loop does not slice weights at every token.
    """
    if model.execution.scan_layers or isinstance(params["layers"], tuple):
        return params
    return params | {
        name: tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(len(layers))
        )
        for name, layers in all_stacks(model.config).items()
        if name in params
    }


def all_stacks(config: ModelConfig) -> dict[str, range]:
    """The decoder's stacks of layers, and `prediction`, where there is such a module."""
    return {**config.stacks, "prediction": config.prediction_layers}


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
    **routing: Any,
) -> tuple[jax.Array, Cache, Routings]:
    x = embed(params, tokens, model)
    stacks = tuple(model.config.stacks)
    x, cache, routings = run_rows(
        params, x, positions, segment_ids, model, stacks, keep_cache=keep_cache, **routing
    )
    return rms_norm(x, params["final_norm"], model.config.rms_norm_eps), cache, routings


def run_rows(
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
    stacks: tuple[str, ...],
    *,
    keep_cache: bool,
    experts: jax.Array | None = None,
    balance: bool = False,
) -> tuple[jax.Array, Cache, Routings]:
    """Run these stacks of layers on whole rows, x [batch, time, hidden]; no final norm.

    Args:
      experts, balance: see `forward_routed`.

    Returns:
      Activations [batch, time, hidden]; what is remembered, as of `prefill`, or None; and what the
      routers did.
    """
    config, execution, layout = model.config, model.execution, model.layout
    params = unstack_layers(params, model)
    cos, sin = rotations(positions, config)
    activation = ("batch", "time", "activation_embed")
    x = layout.constrain(x, activation)

    def body(x: jax.Array, layer: tuple[Params, jax.Array | None]) -> tuple[jax.Array, Any]:
        weights, replayed = layer

        def attend(q: jax.Array, kept: tuple[jax.Array, ...], w: Params) -> tuple[jax.Array, Any]:
            if config.latent is None:
                k, v = kept
            else:
                k, v = expand(kept[0], w["kv_up"], config.latent)
                # Said of their gradients: where attention splits the heads over more devices, these
                # come back in an all-to-all, too, and not whole to every device.
                q, k, v = (layout.constrain(x, ("batch", "time", "heads", None)) for x in (q, k, v))
            out = row_attention(q, k, v, segment_ids, execution, layout)
            if not keep_cache:
                return out, None
            axes, entries = cache_axes(config, new=False), _filled(kept, model)
            return out, tuple(layout.constrain(x.swapaxes(-3, -2), axes) for x in entries)

        def mix(y: jax.Array, w: Params) -> tuple[jax.Array, Routing]:
            assert config.experts is not None
            return mixture_of_experts(
                y,
                w,
                config.experts,
                execution,
                layout,
                axes=activation[:2],
                segment_ids=segment_ids,
                replayed=replayed,
                balance=balance,
            )

        x, kept, routing = _layer(x, weights, cos, sin, model, attend, mix)
        return layout.constrain(x, activation), (kept, routing)

    body = _remat(body, execution.remat)
    cache: Cache = {}
    routings: dict[str, Any] = {}
    for name in stacks:
        replayed = None
        if experts is not None and name == "layers":
            replayed = _by_layer(experts, len(config.stacks[name]))
        if execution.scan_layers:
            x, (cache[name], routings[name]) = jax.lax.scan(body, x, (params[name], replayed))
        else:
            layers = []
            for index, weights in enumerate(params[name]):
                x, kept = body(x, (weights, None if replayed is None else replayed[index]))
                layers.append(kept)
            cache[name] = tuple(kept for kept, _ in layers)
            routings[name] = _stacked([routing for _, routing in layers])
    return x, cache, {name: found for name, found in routings.items() if found is not None}


def _stacked(routings: list[Routing | None]) -> Any:
    return jax.tree.map(lambda *layers: jnp.stack(layers), *routings)


# The experts that tokens chose, side by side for all layers: [..., time, layers * k]. The small
# dimensions are joined because a TPU pads the last two of an array.


def recorded(routings: Routings) -> jax.Array:
    """The experts of the decoder's tokens [..., layers * k], for `forward_routed` to replay.

    Raises:
      ValueError: the model has no experts.
    """
    if "layers" not in routings:
        raise ValueError("a dense model has no experts to record; leave record_experts out")
    chosen = jnp.moveaxis(routings["layers"].chosen, 0, -2)
    return chosen.reshape(*chosen.shape[:-2], -1)


def _by_layer(experts: jax.Array, layers: int) -> jax.Array:
    return jnp.moveaxis(experts.reshape(*experts.shape[:-1], layers, -1), -2, 0)


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
    return forward_routed(params, tokens, positions, segment_ids, model)[0]


def forward_routed(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
    *,
    experts: jax.Array | None = None,
    balance: bool = False,
) -> tuple[jax.Array, Routings]:
    """As `forward`, with what the routers did; of a dense model that is empty.

    Args:
      experts: int [batch, time, layers * k], from `recorded` or the sampler: each token goes to
        these again. What they weigh is worked out anew.
      balance: work out the sequences' imbalance, too.
    """
    hidden, _, routings = _run_rows(
        params,
        tokens,
        positions,
        segment_ids,
        model,
        keep_cache=False,
        experts=experts,
        balance=balance,
    )
    return hidden, routings


def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    model: Decoder,
    *,
    record_experts: bool = False,
) -> tuple[jax.Array, Cache]:
    """Read right-padded prompts.

    Args:
      tokens: int32 [batch, prompt_time].
      lengths: int32 [batch], at least 1.
      record_experts: remember each token's experts, too, as "experts" of the cache, [batch,
        prompt_time, layers * k].

    Returns:
      Activations of each prompt's last token [batch, hidden], and what is remembered of the prompts
      (`ModelConfig.cached`), per layer [batch, heads, prompt_time, width].
    """
    hidden, cache = prefill_rows(params, tokens, lengths, model, record_experts=record_experts)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, cache


def prefill_rows(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    model: Decoder,
    *,
    record_experts: bool = False,
) -> tuple[jax.Array, Cache]:
    """As `prefill`, with the activations of every token [batch, prompt_time, hidden]."""
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segment_ids = (steps < lengths[:, None]).astype(jnp.int32)
    rows = (tokens, steps, segment_ids)
    hidden, cache, routings = _run_rows(params, *rows, model, keep_cache=True)
    if record_experts:
        experts = recorded(routings)
        cache["experts"] = model.layout.constrain(experts, ("batch", None, None))
    return hidden, cache


_IN_ORDER = (0, 1, 2, 3, 4)


def _memory_order(model: Decoder) -> tuple[int, ...]:
    """How [batch, sample, head, time, width] lies in memory.

    On TPU, as its compiler wants to read it: in another order, a decode loop first copies the whole
    cache, which then takes twice the room.
    """
    return (3, 0, 2, 1, 4) if model.layout.platform == "tpu" else _IN_ORDER


def remembered(model: Decoder) -> tuple[tuple[int, int], ...]:
    """`ModelConfig.cached`, as it lies in memory.

    A TPU tiles the last dimension by 128: the 576 values of a latent take the room of 640, or are
    laid out along time, from which they are copied to be read. So they get zeros behind them.
    """
    if model.config.latent is None or model.layout.platform != "tpu":
        return model.config.cached
    return tuple((heads, width + -width % 128) for heads, width in model.config.cached)


def _filled(entries: tuple[jax.Array, ...], model: Decoder) -> tuple[jax.Array, ...]:
    """What a layer remembers, [..., width], with the zeros of `remembered`."""
    widths = (width for _, width in remembered(model))
    return tuple(
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
        for x, width in zip(entries, widths, strict=True)
    )


def _time_axis(model: Decoder) -> int:
    """Of an array of `empty_cache`, from behind."""
    return _memory_order(model).index(3) - len(_IN_ORDER)


def _logical(stored: jax.Array, model: Decoder) -> jax.Array:
    """[batch, samples, heads, time, width], which says how it is read; nothing is moved."""
    order = _memory_order(model)
    return stored.transpose([order.index(i) for i in _IN_ORDER])


def new_cache_arrays(
    batch: int, samples: int, capacity: int, model: Decoder
) -> list[tuple[tuple[int, ...], Axes]]:
    """Shape and logical axes of what a layer remembers of new tokens, as it lies in memory."""
    order, axes = _memory_order(model), cache_axes(model.config, new=True)
    shapes = [(batch, samples, heads, capacity, width) for heads, width in remembered(model)]
    return [(tuple(shape[i] for i in order), tuple(axes[i] for i in order)) for shape in shapes]


def empty_cache(
    batch: int,
    samples: int,
    capacity: int,
    model: Decoder,
    stacks: tuple[str, ...] | None = None,
    *,
    record_experts: bool = False,
) -> Cache:
    """Room for `capacity` new tokens, per layer as `new_cache_arrays`.

    Args:
      stacks: of layers; default: the decoder's.
      record_experts: and for each token's experts, [batch, samples, capacity, layers * k].
    """
    config, dtype = model.config, model.execution.compute_dtype
    arrays = new_cache_arrays(batch, samples, capacity, model)

    def empty(*layers: int) -> tuple[jax.Array, ...]:
        of_layers = ("layers",) * len(layers)
        return tuple(
            model.layout.constrain(jnp.zeros((*layers, *shape), dtype), (*of_layers, *axes))
            for shape, axes in arrays
        )

    cache: Cache = {
        name: empty(len(layers)) if model.execution.scan_layers else tuple(empty() for _ in layers)
        for name, layers in all_stacks(config).items()
        if name in (config.stacks if stacks is None else stacks)
    }
    if record_experts and config.experts is not None:
        width = len(config.stacks["layers"]) * config.experts.num_experts_per_tok
        empty_record = jnp.zeros((batch, samples, capacity, width), config.experts.index_dtype)
        cache["experts"] = model.layout.constrain(empty_record, ("batch", "sample", None, None))
    return cache


def grow_cache(cache: Cache, extra: int, model: Decoder) -> Cache:
    """The same cache with room for `extra` more tokens."""

    def grow(leaf: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, extra)
        return jnp.pad(leaf, widths)

    # The experts' record, unlike what layers remember, lies in one order everywhere.
    axes = {name: -2 if name == "experts" else _time_axis(model) for name in cache}
    return {
        name: jax.tree.map(lambda leaf, axis=axes[name]: grow(leaf, axis), part)
        for name, part in cache.items()
    }


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
    tokens = tokens[..., None]
    positions = jnp.broadcast_to(prompt_lengths[:, None, None] + step, tokens.shape)
    capacity = jax.tree.leaves(cache["layers"])[0].shape[_time_axis(model)]
    filled = (jnp.arange(capacity) <= step)[None, None, None]
    hidden, cache = decode_several(
        params, tokens, positions, prompt_cache, prompt_lengths, cache, step, filled, model
    )
    return hidden[:, :, 0], cache


def decode_several(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    prompt_cache: Cache,
    prompt_lengths: jax.Array,
    cache: Cache,
    step: jax.Array,
    visible: jax.Array,
    model: Decoder,
) -> tuple[jax.Array, Cache]:
    """Read a few new tokens of every sample; for what is not said here, see `run_new`.

    Args:
      tokens, positions: int32 [batch, samples, tokens].

    Returns:
      Activations [batch, samples, tokens, hidden] and the cache.
    """
    x = embed(params, tokens, model, many=False)
    prompts = (prompt_cache, prompt_lengths)
    stacks = tuple(model.config.stacks)
    x, cache = run_new(params, x, positions, *prompts, cache, step, visible, model, stacks)
    return rms_norm(x, params["final_norm"], model.config.rms_norm_eps), cache


def run_new(
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    prompt_cache: Cache,
    prompt_lengths: jax.Array,
    cache: Cache,
    step: jax.Array,
    visible: jax.Array,
    model: Decoder,
    stacks: tuple[str, ...],
) -> tuple[jax.Array, Cache]:
    """Run these stacks of layers on a few new tokens of every sample; no final norm.

    Args:
      params: as `unstack_layers` returns them.
      x: [batch, samples, tokens, hidden].
      positions: int32 [batch, samples, tokens].
      prompt_cache, prompt_lengths: what is remembered of the prompts.
      cache: of the new tokens; entries from `step` on are filled here.
      step: int32 scalar; capacity - tokens at most.
      visible: bool [batch, samples, tokens, capacity], which entries of the cache a token attends
        to, its own included; the first two dimensions may be 1.

    Returns:
      Activations [batch, samples, tokens, hidden], and the cache of these stacks.
    """
    config, shape = model.config, x.shape[:3]

    def joined(rows: jax.Array) -> jax.Array:
        """[batch, samples, tokens, ...] -> [batch, samples * tokens, ...]."""
        return rows.reshape(shape[0], -1, *rows.shape[3:])

    def apart(rows: jax.Array) -> jax.Array:
        return rows.reshape(*shape, *rows.shape[2:])

    # But to attention, a sample's tokens are like those of other samples.
    cos, sin = rotations(joined(positions), config)
    x = model.layout.constrain(joined(x), ("batch", "sample", "activation_embed"))

    def run(x: jax.Array, weights: Params, prompt: Any, write: Callable[..., Any]) -> Any:
        def attend(q: jax.Array, kept: tuple[jax.Array, ...], w: Params) -> tuple[jax.Array, Any]:
            q = apart(q)
            entries = (apart(entry).swapaxes(-3, -2) for entry in _filled(kept, model))
            cache, new = write(tuple(entry.transpose(_memory_order(model)) for entry in entries))
            new = tuple(_logical(entry, model) for entry in new)
            if config.latent is not None:
                latents = prompt[0], prompt_lengths, new[0], visible
                out = absorbed_attention(q, *latents, w["kv_up"], config.latent)
            else:
                keys, values = (prompt[0], new[0]), (prompt[1], new[1])
                out = cached_attention(q, keys, values, prompt_lengths, visible)
            return joined(out), cache

        def mix(y: jax.Array, w: Params) -> tuple[jax.Array, Routing]:
            assert config.experts is not None
            execution, layout = model.execution, model.layout
            return mixture_of_experts(
                y, w, config.experts, execution, layout, axes=("batch", "sample")
            )

        return _layer(x, weights, cos, sin, model, attend, mix)

    def unrolled(x: jax.Array, name: str) -> tuple[jax.Array, Any, Any]:
        kept_layers, routings = [], []
        for weights, prompt, entry in zip(
            params[name], prompt_cache[name], cache[name], strict=True
        ):

            def write(new: tuple[jax.Array, ...], entry: Any = entry) -> Any:
                put = jax.lax.dynamic_update_slice_in_dim
                axis = _time_axis(model)
                kept = tuple(put(old, x, step, axis) for old, x in zip(entry, new, strict=True))
                return kept, kept

            x, kept, routing = run(x, weights, prompt, write)
            kept_layers.append(kept)
            routings.append(routing)
        return x, tuple(kept_layers), _stacked(routings)

    def scanned(x: jax.Array, name: str) -> tuple[jax.Array, Any, Any]:
        # The cache is carried, not scanned over: a scanned-over cache is copied at every token.
        def body(carry: tuple[jax.Array, Any], xs: Any) -> tuple[tuple[jax.Array, Any], Any]:
            x, stacked = carry
            weights, prompt, index = xs

            def write(new: tuple[jax.Array, ...]) -> Any:
                start = [index, *[jnp.int32(0)] * len(_IN_ORDER)]
                start[_time_axis(model)] = step
                kept = tuple(
                    jax.lax.dynamic_update_slice(old, x[None], start)
                    for old, x in zip(stacked, new, strict=True)
                )
                pick = jax.lax.dynamic_index_in_dim
                return kept, tuple(pick(leaf, index, keepdims=False) for leaf in kept)

            x, kept, routing = run(x, weights, prompt, write)
            return (x, kept), routing

        indices = jnp.arange(len(all_stacks(config)[name]), dtype=jnp.int32)
        xs = (params[name], prompt_cache[name], indices)
        carry, routings = jax.lax.scan(body, (x, cache[name]), xs)
        return *carry, routings

    following: Cache = {}
    routings: Routings = {}
    for name in stacks:
        step_of = scanned if model.execution.scan_layers else unrolled
        x, following[name], routings[name] = step_of(x, name)
    if "experts" in cache:
        put = jax.lax.dynamic_update_slice_in_dim
        following["experts"] = put(cache["experts"], apart(recorded(routings)), step, axis=2)
    return apart(x), following
