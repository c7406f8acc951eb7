"""The decoder as pure functions: one layer, run on whole rows or on a few new tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.models import kv_cache
from r1jax.models.attention import cached_attention, row_attention
from r1jax.models.config import Decoder, ModelConfig
from r1jax.models.experts import Routing, mixture_of_experts
from r1jax.models.kv_cache import KVCache, LayerCache, PromptCache, StackCache
from r1jax.models.latent_attention import (
    absorbed_queries,
    expand,
    queries_and_latents,
    values_of_latents,
)
from r1jax.models.paged_attention import kernel_reads, paged_attention
from r1jax.models.paged_cache import OF_DECODER, PagedCache, PageList, write_current
from r1jax.models.parameters import Params
from r1jax.models.primitives import project, rms_norm, swiglu
from r1jax.models.remat import remat, remat_policy
from r1jax.models.rope import rotate, rotations
from r1jax.sharding import Axes, Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# Given the queries, the layer's cache entries of the tokens that it reads, [..., heads, width]
# each, and its weights: attention's output, and the layer's cache.
Attend = Callable[[jax.Array, LayerCache, Params], tuple[jax.Array, LayerCache | None]]
# The experts of a layer, given their input and the layer's weights.
Mix = Callable[[jax.Array, Params], tuple[jax.Array, Routing]]
# Stack of layers with experts -> what their routers did, [layers, ...].
Routings = dict[str, Routing]
# The index of a layer in its stack: traced where layers are scanned.
Layer = int | jax.Array
# As `Attend`, of a layer whose cache is known: queries and entries [rows, samples, tokens, ...].
_AttendNew = Callable[[jax.Array, LayerCache, Params], tuple[jax.Array, LayerCache]]


def _layer(
    x: jax.Array,
    weights: Params,
    cos: jax.Array,
    sin: jax.Array,
    model: Decoder,
    attend: Attend,
    mix: Mix,
) -> tuple[jax.Array, LayerCache | None, Routing | None]:
    """One pre-norm block on x [..., hidden]; `attend` decides what the queries see.

    Returns:
      The block's value, the layer's cache, and what a router did; None without experts.
    """
    config, layout = model.config, model.layout
    w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), weights)
    y = rms_norm(x, w["attention_norm"], config.rms_norm_eps)
    if config.latent is not None:
        q, *entries = queries_and_latents(y, w, cos, sin, config, layout)
    else:
        q, *entries = _queries_keys_values(y, w, cos, sin, config, layout)
    attended, cache = attend(q, tuple(entries), w)
    x = x + project(attended, w["o"], layout, inputs=2)
    y = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
    if config.experts is not None and "router" in w:
        if "router_bias" in w:
            # It decides between experts that may be close: it is not rounded.
            w["router_bias"] = weights["router_bias"]
        output, routing = mix(y, w)
        return x + output, cache, routing
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
    return _split_layers(params, model)


def unstack_layers_of_slots(params: Params, model: Decoder) -> Params:
    """As `unstack_layers`, for `decode_slots`: on a GPU they are split in any case.

    A scan copies each layer's weights there before it multiplies with them, at every token: that
    moves their bytes three times. Split, they are copied once for all tokens of a call.
    """
    if model.layout.platform == "gpu" and not isinstance(params["layers"], tuple):
        return _split_layers(params, model)
    return unstack_layers(params, model)


def _split_layers(params: Params, model: Decoder) -> Params:
    return params | {
        name: tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], params[name]) for i in range(len(layers))
        )
        for name, layers in model.config.all_stacks.items()
        if name in params
    }


def embed(
    params: Params, tokens: Int[Array, "*shape"], model: Decoder, *, gather_table: bool = True
) -> Float[Array, "*shape hidden"]:
    """Token ids to activations in the compute dtype.

    Args:
      gather_table: where `fsdp` splits the table, gather it, as is best for a batch of rows; else
        gather the activations of a few tokens.
    """
    table, constrain = params["embed"].astype(model.execution.compute_dtype), model.layout.constrain
    if gather_table:
        return jnp.take(constrain(table, ("vocab", None)), tokens, axis=0, mode="clip")
    tokens = constrain(tokens, (None,) * tokens.ndim)
    return constrain(jnp.take(table, tokens, axis=0, mode="clip"), (None,) * (tokens.ndim + 1))


def unembedding(params: Params, model: Decoder) -> Float[Array, "hidden vocab"]:
    """The output matrix in the compute dtype (the embedding, when tied).

    Raises:
      ValueError: the model has another head.
    """
    if model.config.head != "language":
        raise ValueError(f"a model with head = {model.config.head!r} has no logits")
    matrix = params["embed"].T if model.config.tie_word_embeddings else params["unembed"]
    return matrix.astype(model.execution.compute_dtype)


def logits(
    params: Params, hidden: Float[Array, "*shape hidden"], model: Decoder
) -> Float[Array, "*shape vocab"]:
    """The logits of the next token in float32, from normalised activations."""
    return jnp.matmul(hidden, unembedding(params, model), preferred_element_type=jnp.float32)


# --- Whole rows: training, scoring, prefill ------------------------------------------------------


class TokenRows(NamedTuple):
    """Rows of tokens, in which several documents may follow each other.

    positions: counted from 0 within each segment.
    segment_ids: tokens attend within their segment; 0 is padding.
    experts: of each token, as the sampler records them, in place of a choice. Their weights are
        computed anew.
    prompt_of: for rows of a prompt and its samples, where the prompt is computed once: a row is the
        prompt, padded on the right to prompt_time, then `samples` equal parts, each with a sample
        (or several), whose positions go on from the prompt's. Which tokens of the prompt the
        samples see: all but padding.
    """

    tokens: Int[Array, "batch time"]
    positions: Int[Array, "batch time"]
    segment_ids: Int[Array, "batch time"]
    experts: Int[Array, "batch time layers_k"] | None = None
    prompt_of: Bool[Array, "batch samples prompt_time"] | None = None


def right_padded(tokens: Int[Array, "batch time"], lengths: Int[Array, " batch"]) -> TokenRows:
    """Rows of one document each, padded on the right."""
    steps = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return TokenRows(tokens, steps, (steps < lengths[:, None]).astype(jnp.int32))


class _RowsOutput(NamedTuple):
    """What layers give for whole rows.

    routings: of the routers; empty without experts.
    stacks: as of `PromptCache`, where they are kept.
    """

    hidden: Float[Array, "batch time hidden"]
    routings: Routings
    stacks: dict[str, StackCache]


def forward(
    params: Params,
    rows: TokenRows,
    model: Decoder,
    *,
    balance: bool = False,
    keep_cache: bool = False,
) -> _RowsOutput:
    """Run the decoder on whole rows.

    Args:
      balance: compute the sequences' imbalance, too (`Routing.imbalance`).
      keep_cache: return each layer's cache, too.

    Returns:
      Normalised activations; `logits`, `token_log_probs` or `reward_scores` read them.
    """
    x = embed(params, rows.tokens, model)
    stacks = tuple(model.config.stacks)
    output = run_rows(params, x, rows, model, stacks, balance=balance, keep_cache=keep_cache)
    hidden = rms_norm(output.hidden, params["final_norm"], model.config.rms_norm_eps)
    return output._replace(hidden=hidden)


def run_rows(
    params: Params,
    x: Float[Array, "batch time hidden"],
    rows: TokenRows,
    model: Decoder,
    stacks: tuple[str, ...],
    *,
    balance: bool = False,
    keep_cache: bool = False,
) -> _RowsOutput:
    """Run these stacks of layers on activations of whole rows; no final norm."""
    config, execution, layout = model.config, model.execution, model.layout
    params = unstack_layers(params, model)
    cos, sin = rotations(rows.positions, config)
    activation = ("batch", "time", "activation_embed")
    x = layout.constrain(x, activation)

    def attend(q: jax.Array, entries: LayerCache, w: Params) -> tuple[jax.Array, LayerCache | None]:
        if config.latent is None:
            k, v = entries
        else:
            k, v = expand(entries[0], w["kv_up"], config.latent)
            # For their gradients: where attention splits the heads over more devices, these come
            # back in an all-to-all, too, and not whole to every device.
            q, k, v = (layout.constrain(x, ("batch", "time", "heads", None)) for x in (q, k, v))
        out = row_attention(q, k, v, rows.segment_ids, execution, layout, rows.prompt_of)
        return out, kv_cache.prompt_entries(entries, model) if keep_cache else None

    def body(x: jax.Array, layer: tuple[Params, jax.Array | None]) -> tuple[jax.Array, Any]:
        weights, replayed = layer

        def mix(y: jax.Array, w: Params) -> tuple[jax.Array, Routing]:
            return mixture_of_experts(
                y,
                w,
                model,
                axes=activation[:2],
                segment_ids=rows.segment_ids,
                replayed=replayed,
                balance=balance,
            )

        x, cache, routing = _layer(x, weights, cos, sin, model, attend, mix)
        return layout.constrain(x, activation), (cache, routing)

    body = remat(body, remat_policy(model, *x.shape[:2]), scanned=execution.scan_layers)
    caches: dict[str, Any] = {}
    routings: dict[str, Routing | None] = {}
    for name in stacks:
        replayed = None
        if rows.experts is not None and name == "layers":
            replayed = _by_layer(rows.experts, len(config.stacks[name]))
        if execution.scan_layers:
            x, (caches[name], routings[name]) = jax.lax.scan(body, x, (params[name], replayed))
        else:
            outputs = []
            for index, weights in enumerate(params[name]):
                x, output = body(x, (weights, None if replayed is None else replayed[index]))
                outputs.append(output)
            caches[name] = tuple(cache for cache, _ in outputs)
            routings[name] = _stacked([routing for _, routing in outputs])
    return _RowsOutput(x, _without_dense(routings), caches)


def prefill(
    params: Params,
    tokens: Int[Array, "batch prompt_time"],
    lengths: Int[Array, " batch"],
    model: Decoder,
    *,
    record_experts: bool = False,
) -> tuple[Float[Array, "batch prompt_time hidden"], PromptCache]:
    """Run the decoder on right-padded prompts, of one token at least.

    Args:
      record_experts: cache each token's experts, too.

    Returns:
      Normalised activations (`last_token` has those that predict) and the prompts' cache.
    """
    output = forward(params, right_padded(tokens, lengths), model, keep_cache=True)
    experts = None
    if record_experts:
        experts = _chosen_experts(output.routings)
        experts = model.layout.constrain(experts, ("batch", None, None))
    return output.hidden, PromptCache(output.stacks, lengths, experts)


def last_token(
    hidden: Float[Array, "batch time hidden"], lengths: Int[Array, " batch"]
) -> Float[Array, "batch hidden"]:
    """The activations of the last token of each right-padded row."""
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


# --- Recorded experts: side by side for all layers, [..., layers * k], because a TPU pads the last
# two dimensions of an array ----------------------------------------------------------------------


def _chosen_experts(routings: Routings) -> Int[Array, "... layers_k"]:
    """The experts of the decoder's tokens, for `TokenRows` to replay.

    Raises:
      ValueError: the model has no experts.
    """
    if "layers" not in routings:
        raise ValueError("a dense model has no experts to record; leave record_experts out")
    chosen = jnp.moveaxis(routings["layers"].chosen, 0, -2)
    return chosen.reshape(*chosen.shape[:-2], -1)


def _by_layer(experts: jax.Array, layers: int) -> jax.Array:
    return jnp.moveaxis(experts.reshape(*experts.shape[:-1], layers, -1), -2, 0)


def _stacked(routings: list[Routing | None]) -> Routing | None:
    stacked: Routing | None = jax.tree.map(lambda *layers: jnp.stack(layers), *routings)
    return stacked


def _without_dense(routings: dict[str, Routing | None]) -> Routings:
    return {name: routing for name, routing in routings.items() if routing is not None}


# --- A few new tokens of every sample: decoding --------------------------------------------------


@struct.dataclass
class NewTokens:
    """A few new tokens of every sample, and what they attend to beside the prompts.

    entry: of the KV cache, the first of those that they fill.
    visible: the entries that each attends to, itself included; the first two dimensions may be 1.
    """

    tokens: Int[Array, "batch samples tokens"]
    positions: Int[Array, "batch samples tokens"]
    entry: Int[Array, ""]
    visible: Bool[Array, "batch samples tokens capacity"]


def next_tokens(
    tokens: Int[Array, "batch samples"],
    step: Int[Array, ""],
    prompts: PromptCache,
    cache: KVCache,
    model: Decoder,
) -> NewTokens:
    """The token after each prompt and `step` new tokens; it attends to all of them."""
    tokens = tokens[..., None]
    positions = jnp.broadcast_to(prompts.lengths[:, None, None] + step, tokens.shape)
    filled = jnp.arange(kv_cache.capacity_of(cache, model)) <= step
    return NewTokens(tokens, positions, step, filled[None, None, None])


def decode(
    params: Params, new: NewTokens, prompts: PromptCache, cache: KVCache, model: Decoder
) -> tuple[Float[Array, "batch samples tokens hidden"], KVCache]:
    """Run the decoder on a few new tokens of every sample.

    Args:
      params: as `unstack_layers` returns them.
      cache: from `empty_cache`; entries from `new.entry` on are filled here.

    Returns:
      Normalised activations, and the cache.
    """
    x = embed(params, new.tokens, model, gather_table=False)
    stacks = tuple(model.config.stacks)
    x, cache = run_new_tokens(params, x, new, prompts, cache, model, stacks)
    return rms_norm(x, params["final_norm"], model.config.rms_norm_eps), cache


def run_new_tokens(
    params: Params,
    x: Float[Array, "batch samples tokens hidden"],
    new: NewTokens,
    prompts: PromptCache,
    cache: KVCache,
    model: Decoder,
    stacks: tuple[str, ...],
) -> tuple[Float[Array, "batch samples tokens hidden"], KVCache]:
    """Run these stacks of layers on activations of a few new tokens; as `decode`, no final norm."""

    def attend(name: str, layer: Layer, stored: Any) -> _AttendNew:
        prompt = _of_layer(prompts.stacks[name], layer)
        index = None if isinstance(layer, int) else layer

        def of_samples(
            q: jax.Array, entries: LayerCache, w: Params
        ) -> tuple[jax.Array, LayerCache]:
            written = kv_cache.write(
                stored, kv_cache.padded(entries, model), new.entry, model, index
            )
            seen = kv_cache.read(written, model, index)
            latent = model.config.latent
            if latent is not None:
                wide = absorbed_queries(q, w["kv_up"], latent, seen[0].shape[-1])
                keys = prompt[0], seen[0]
                out = cached_attention(wide, keys, keys, prompts.lengths, new.visible)
                return values_of_latents(out, w["kv_up"], latent), written
            keys, values = (prompt[0], seen[0]), (prompt[1], seen[1])
            return cached_attention(q, keys, values, prompts.lengths, new.visible), written

        return of_samples

    x, written, routings = _run_layers(
        params, x, new.positions, cache.stacks, attend, model, stacks, ("batch", "sample")
    )
    cache = replace(cache, stacks={**cache.stacks, **written})
    if cache.experts is not None:
        put = jax.lax.dynamic_update_slice_in_dim
        chosen = _chosen_experts(routings).reshape(*x.shape[:3], -1)
        cache = replace(cache, experts=put(cache.experts, chosen, new.entry, axis=2))
    return x, cache


@struct.dataclass
class SlotTokens:
    """A few new tokens of every slot, and what they attend to.

    entry: of the slots' current pages, the first of those that they fill.
    visible: the entries of the current page that each attends to, itself included.
    reads: the other pages.
    """

    tokens: Int[Array, "shards slots tokens"]
    positions: Int[Array, "shards slots tokens"]
    entry: Int[Array, ""]
    visible: Bool[Array, "shards slots tokens page"]
    reads: PageList


def decode_slots(
    params: Params, new: SlotTokens, cache: PagedCache, model: Decoder, *, record_experts: bool
) -> tuple[
    Float[Array, "shards slots tokens hidden"],
    PagedCache,
    Int[Array, "shards slots tokens layers_k"] | None,
]:
    """Run the decoder on a few new tokens of every slot.

    Args:
      params: as `unstack_layers_of_slots` returns them.
      record_experts: return the experts of each token, too.

    Returns:
      Normalised activations, the cache, whose pages of the pool are only read, and experts
      [shards, slots, tokens, layers * k] or None.
    """
    x = embed(params, new.tokens, model, gather_table=False)
    stacks = tuple(model.config.stacks)
    x, cache, routings = run_slot_tokens(params, x, new, cache, model, stacks, OF_DECODER)
    experts = _chosen_experts(routings).reshape(*x.shape[:3], -1) if record_experts else None
    return rms_norm(x, params["final_norm"], model.config.rms_norm_eps), cache, experts


def run_slot_tokens(
    params: Params,
    x: Float[Array, "shards slots tokens hidden"],
    new: SlotTokens,
    cache: PagedCache,
    model: Decoder,
    stacks: tuple[str, ...],
    held: int,
) -> tuple[Float[Array, "shards slots tokens hidden"], PagedCache, Routings]:
    """Run these stacks of layers on activations of a few new tokens; as `decode_slots`, no norm.

    Args:
      held: the bit of entries that hold a token of these layers, see `PagedCache`.
    """
    held_pages = replace(new.reads, filled=(new.reads.filled & held) > 0)
    _, slots, tokens = new.tokens.shape
    reads = kernel_reads(held_pages, slots, tokens, model)

    def attend(name: str, layer: Layer, stored: Any) -> _AttendNew:
        index = None if isinstance(layer, int) else layer
        pages: Any = cache.pages[name] if index is not None else _of_layer(cache.pages[name], layer)

        def of_slots(q: jax.Array, entries: LayerCache, w: Params) -> tuple[jax.Array, LayerCache]:
            entries = kv_cache.padded(entries, model)
            written = write_current(stored, entries, new.entry, index)
            rest: Any = (pages, written, reads, new.visible, model)
            latent = model.config.latent
            if latent is not None:
                wide = absorbed_queries(q, w["kv_up"], latent, written[0].shape[-1])
                out = paged_attention(wide, *rest, layer=index)
                return values_of_latents(out, w["kv_up"], latent), written
            return paged_attention(q, *rest, layer=index), written

        return of_slots

    x, written, routings = _run_layers(
        params, x, new.positions, cache.current, attend, model, stacks, ("slots", None)
    )
    return x, replace(cache, current={**cache.current, **written}), routings


def _of_layer(stack: StackCache, layer: Layer) -> Any:
    """One layer's arrays, of a tuple of layers or of stacked arrays."""
    if isinstance(layer, int):
        return stack[layer]
    pick = jax.lax.dynamic_index_in_dim
    return tuple(pick(leaf, layer, keepdims=False) for leaf in stack)


def _run_layers(
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    caches: dict[str, StackCache],
    attend: Callable[[str, Layer, Any], _AttendNew],
    model: Decoder,
    stacks: tuple[str, ...],
    axes: Axes,
) -> tuple[jax.Array, dict[str, StackCache], Routings]:
    """Run these stacks of layers on activations of a few new tokens [rows, samples, tokens, ...].

    Args:
      params: layers may be split where the caches are stacked.
      caches: what is carried from layer to layer, and written.
      attend: given a stack's name, a layer and its cache (that of its stack where layers are
        scanned), attention of that layer.
      axes: logical axes of the rows and samples.
    """
    config, shape = model.config, x.shape[:3]

    # Except in attention, a sample's tokens are like those of other samples.
    def joined(rows: jax.Array) -> jax.Array:
        """[batch, samples, tokens, ...] -> [batch, samples * tokens, ...]."""
        return rows.reshape(shape[0], -1, *rows.shape[3:])

    def split(rows: jax.Array) -> jax.Array:
        return rows.reshape(*shape, *rows.shape[2:])

    cos, sin = rotations(joined(positions), config)
    x = model.layout.constrain(joined(x), (*axes, "activation_embed"))

    def mix(y: jax.Array, w: Params) -> tuple[jax.Array, Routing]:
        return mixture_of_experts(y, w, model, axes=axes)

    def run(
        name: str, layer: Layer, x: jax.Array, stored: Any, weights: Params
    ) -> tuple[jax.Array, Any, Routing | None]:
        of_samples = attend(name, layer, stored)

        def joined_attend(
            q: jax.Array, entries: LayerCache, w: Params
        ) -> tuple[jax.Array, LayerCache]:
            out, written = of_samples(split(q), tuple(map(split, entries)), w)
            return joined(out), written

        return _layer(x, weights, cos, sin, model, joined_attend, mix)

    written: dict[str, StackCache] = {}
    routings: dict[str, Routing | None] = {}
    for name in stacks:
        outputs: list[Routing | None] = []
        if model.execution.scan_layers and isinstance(params[name], tuple):
            # One trace for all layers.
            of_stack = jax.jit(partial(run, name))
            stored: Any = caches[name]
            for index, weights in enumerate(params[name]):
                x, stored, routing = of_stack(jnp.int32(index), x, stored, weights)
                outputs.append(routing)
            written[name], routings[name] = stored, _stacked(outputs)
        elif model.execution.scan_layers:

            def scanned(
                carry: tuple[jax.Array, Any], xs: tuple[Params, jax.Array], name: str = name
            ) -> tuple[tuple[jax.Array, Any], Routing | None]:
                # The cache is carried, not scanned over: that would copy it at every token.
                x, stored, routing = run(name, xs[1], *carry, xs[0])
                return (x, stored), routing

            indices = jnp.arange(len(config.all_stacks[name]), dtype=jnp.int32)
            carry = (x, caches[name])
            (x, written[name]), routings[name] = jax.lax.scan(
                scanned, carry, (params[name], indices)
            )
        else:
            layers = []
            for index, (weights, stored) in enumerate(zip(params[name], caches[name], strict=True)):
                x, layer_cache, routing = run(name, index, x, stored, weights)
                layers.append(layer_cache)
                outputs.append(routing)
            written[name], routings[name] = tuple(layers), _stacked(outputs)
    return split(x), written, _without_dense(routings)
