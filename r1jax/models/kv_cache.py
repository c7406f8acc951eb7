"""The KV cache: what attention reads of earlier tokens, per layer keys and values, or latents.

A prompt is cached once, for all of its samples (`PromptCache`). The tokens sampled after it have a
`KVCache` of some capacity, which grows by doubling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.models.config import Decoder
from r1jax.sharding import Axes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

FIRST_CAPACITY = 128  # new tokens that the first cache has room for

# The arrays of one layer: keys and values, or latents.
LayerCache = tuple[jax.Array, ...]
# Of a stack of layers: arrays [layers, ...] where layers are scanned, else one entry per layer.
StackCache = LayerCache | tuple[LayerCache, ...]


@struct.dataclass
class PromptCache:
    """Of right-padded prompts.

    stacks: stack of layers -> per layer [batch, heads, prompt_time, width].
    lengths: tokens of each prompt.
    experts: the experts that each token chose, where they are recorded.
    """

    stacks: dict[str, StackCache]
    lengths: Int[Array, " batch"]
    experts: Int[Array, "batch prompt_time layers_k"] | None = None


@struct.dataclass
class KVCache:
    """Of the tokens after the prompts, `capacity` per sample.

    stacks: stack of layers -> per layer as `cache_arrays`.
    experts: as of `PromptCache`.
    """

    stacks: dict[str, StackCache]
    experts: Int[Array, "batch samples capacity layers_k"] | None = None


def capacities(max_new_tokens: int, first: int = FIRST_CAPACITY) -> list[int]:
    """The capacities of a cache as it grows: `first`, doubling, the last one max_new_tokens."""
    sizes = [min(first, max_new_tokens)]
    while sizes[-1] < max_new_tokens:
        sizes.append(min(2 * sizes[-1], max_new_tokens))
    return sizes


# --- Shapes and order in memory ------------------------------------------------------------------

_LOGICAL = (0, 1, 2, 3, 4)  # batch, samples, heads, time, width


def _memory_order(model: Decoder) -> tuple[int, ...]:
    """How [batch, samples, heads, time, width] lies in memory.

    On TPU, as its compiler wants to read it: in another order, a decode loop first copies the whole
    cache, which then takes twice the memory.
    """
    return (3, 0, 2, 1, 4) if model.layout.platform == "tpu" else _LOGICAL


def _time_axis(model: Decoder) -> int:
    """Of a layer's array, counted from the last."""
    return _memory_order(model).index(3) - len(_LOGICAL)


def entry_shapes(model: Decoder) -> tuple[tuple[int, int], ...]:
    """(heads, width) of a token in each array, as in memory.

    A TPU tiles the last dimension by 128: the 576 values of a latent take the memory of 640, or are
    laid out along time, from which they are copied to be read. So they are padded with zeros.
    """
    if model.config.latent is None or model.layout.platform != "tpu":
        return model.config.cache_shapes
    return tuple((heads, width + -width % 128) for heads, width in model.config.cache_shapes)


def head_axes(model: Decoder) -> Axes:
    """Logical axes of the heads of a token's entries, and of their width."""
    # A latent has no heads that devices could share.
    return (None, None) if model.config.latent is not None else ("kv_heads", "head_dim")


def cache_arrays(
    batch: int, samples: int, capacity: int, model: Decoder
) -> list[tuple[tuple[int, ...], Axes]]:
    """Shape and logical axes of a layer's arrays in a `KVCache`, in memory order."""
    heads_axis, width_axis = head_axes(model)
    order, axes = _memory_order(model), ("batch", "sample", heads_axis, None, width_axis)
    shapes = [(batch, samples, heads, capacity, width) for heads, width in entry_shapes(model)]
    return [(tuple(shape[i] for i in order), tuple(axes[i] for i in order)) for shape in shapes]


def padded(entries: LayerCache, model: Decoder) -> LayerCache:
    """A layer's entries [..., width] in the width that they have in the cache."""
    return tuple(
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
        for x, (_, width) in zip(entries, entry_shapes(model), strict=True)
    )


# --- Making, growing, writing, reading -----------------------------------------------------------


def prompt_entries(entries: LayerCache, model: Decoder) -> LayerCache:
    """A layer's arrays of a `PromptCache`, from [batch, prompt_time, heads, width] each."""
    heads_axis, width_axis = head_axes(model)
    axes = ("batch", heads_axis, None, width_axis)
    return tuple(model.layout.constrain(x.swapaxes(-3, -2), axes) for x in padded(entries, model))


def empty_cache(
    batch: int,
    samples: int,
    capacity: int,
    model: Decoder,
    *,
    with_module: bool = False,
    record_experts: bool = False,
) -> KVCache:
    """A cache of zeros.

    Args:
      with_module: for the layers of the module for multi-token prediction, too.
      record_experts: for each token's experts, too.
    """
    config, layout, dtype = model.config, model.layout, model.execution.compute_dtype
    arrays = cache_arrays(batch, samples, capacity, model)

    def empty(*layers: int) -> LayerCache:
        layer_axes = ("layers",) * len(layers)
        return tuple(
            layout.constrain(jnp.zeros((*layers, *shape), dtype), (*layer_axes, *axes))
            for shape, axes in arrays
        )

    stacks: dict[str, StackCache] = {
        name: empty(len(layers)) if model.execution.scan_layers else tuple(empty() for _ in layers)
        for name, layers in (config.all_stacks if with_module else config.stacks).items()
    }
    experts = None
    if record_experts and config.experts is not None:
        width = len(config.stacks["layers"]) * config.experts.num_experts_per_tok
        experts = jnp.zeros((batch, samples, capacity, width), config.experts.index_dtype)
        experts = layout.constrain(experts, ("batch", "sample", None, None))
    return KVCache(stacks, experts)


def grow_cache(cache: KVCache, extra: int, model: Decoder) -> KVCache:
    """The same cache with room for `extra` more tokens."""

    def grow(leaf: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, extra)
        return jnp.pad(leaf, widths)

    stacks = jax.tree.map(lambda leaf: grow(leaf, _time_axis(model)), cache.stacks)
    return KVCache(stacks, None if cache.experts is None else grow(cache.experts, -2))


def capacity_of(cache: KVCache, model: Decoder) -> int:
    return int(jax.tree.leaves(cache.stacks)[0].shape[_time_axis(model)])


def write(
    stored: LayerCache,
    new: LayerCache,
    entry: Int[Array, ""],
    model: Decoder,
    layer: Int[Array, ""] | None = None,
) -> LayerCache:
    """The arrays with `new` in the entries from `entry` on.

    Args:
      stored: a layer's arrays in a `KVCache`, or with `layer` those of its stack.
      new: [batch, samples, tokens, heads, width] each, `padded`.
      entry: at most capacity - tokens.
      layer: index in the stack.
    """
    axis, order = _time_axis(model), _memory_order(model)
    new = tuple(x.swapaxes(-3, -2).transpose(order) for x in new)
    if layer is None:
        put = jax.lax.dynamic_update_slice_in_dim
        return tuple(put(old, x, entry, axis) for old, x in zip(stored, new, strict=True))
    start = [layer, *[jnp.int32(0)] * len(_LOGICAL)]
    start[axis] = entry
    return tuple(
        jax.lax.dynamic_update_slice(old, x[None], start)
        for old, x in zip(stored, new, strict=True)
    )


def read(
    stored: LayerCache, model: Decoder, layer: Int[Array, ""] | None = None
) -> tuple[Float[Array, "batch samples heads capacity width"], ...]:
    """A layer's arrays in logical order, which says how they are read: nothing is moved.

    Args:
      stored, layer: as of `write`.
    """
    if layer is not None:
        pick = jax.lax.dynamic_index_in_dim
        stored = tuple(pick(leaf, layer, keepdims=False) for leaf in stored)
    order = _memory_order(model)
    return tuple(leaf.transpose([order.index(i) for i in _LOGICAL]) for leaf in stored)
