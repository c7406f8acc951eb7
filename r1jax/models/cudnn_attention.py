"""Causal attention over packed rows by cuDNN, forward and backward, on GPUs from Hopper on.

cuDNN reads segments where they lie in the rows, by their lengths and offsets. JAX's public function
takes lengths only, so this file binds the two primitives below it, which are private, and the same
in JAX 0.10 and 0.11. It does not call `fused_attention_stablehlo.dot_product_attention` above them,
which up to JAX 0.11.0 gives cuDNN the offsets of query heads for the keys, too: with grouped heads
it reads the keys of other tokens, without an error (jax-ml/jax#39521).

Every token is in a segment, padding as well: cuDNN does not write outputs or gradients of tokens
between segments, and not all of its engines honour gaps between them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from r1jax.models.remat import KEPT_OF_ATTENTION

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

# Name of the conditionals, for a planner: the branch that does most is not cuDNN's.
CUDNN_ATTENTION = "cudnn_attention"
_MOST_SEGMENTS = 64
_TOKENS_OF_A_SEGMENT = 128
_LARGEST_HEAD = 128  # of what cuDNN differentiates on every GPU with packed rows
_HOPPER = 9.0

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class Segments(NamedTuple):
    """Where the segments of rows lie, in cuDNN's terms.

    lengths: tokens of each, 0 for those beyond the last. Those of all rows follow each other,
        whatever row they are of: only their number is limited, rows x segments.
    starts: first token of each, counted over all rows; the number of all tokens beyond the last.
    fit: whether there are no more than that.
    """

    lengths: Int[Array, "batch segments"]
    starts: Int[Array, "batch segments+1"]
    fit: Bool[Array, ""]


def segments_a_row(time: int) -> int:
    """How many segments a row of `time` tokens may have on average.

    It is part of the compiled program: cuDNN's softmax statistics are of float32 [rows x segments,
    heads, time].
    """
    return min(_MOST_SEGMENTS, max(8, time // _TOKENS_OF_A_SEGMENT))


def find_segments(segment_ids: Int[Array, "batch time"], segments: int) -> Segments:
    """The runs of equal ids in each row, of padding too."""
    batch, time = segment_ids.shape
    begins = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True).reshape(-1)
    size = batch * (segments + 1)
    (starts,) = jnp.nonzero(begins, size=size, fill_value=batch * time)
    starts = starts.astype(jnp.int32)
    lengths = jnp.diff(starts[: batch * segments + 1]).reshape(batch, segments)
    fit = jnp.sum(begins) <= batch * segments
    return Segments(lengths, starts.reshape(batch, segments + 1), fit)


def check(
    q: Float[Array, "batch time heads head_dim"],
    v: Float[Array, "batch time kv_heads value_dim"],
    device: jax.Device,
) -> None:
    """Raises ValueError, with the remedy, for what cuDNN would refuse or read wrongly."""
    batch, time, heads, head_dim = q.shape
    capability = getattr(device, "compute_capability", None)
    reason = None
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        reason = f"needs bfloat16, and model.compute_dtype is {q.dtype}"
    elif head_dim > _LARGEST_HEAD or head_dim % 8 or v.shape[3] > head_dim:
        reason = (
            f"needs heads of at most {_LARGEST_HEAD}, a multiple of 8, with values that are not "
            f"larger; they are of {head_dim}, values of {v.shape[3]}"
        )
    elif batch * time * heads * head_dim >= 2**31:
        reason = (
            f"counts in int32, and the queries of {batch} rows of {time} tokens on a device have "
            f"{batch * time * heads * head_dim} numbers; more micro-batches make them fewer"
        )
    elif capability is not None and float(capability) < _HOPPER:
        reason = f"needs compute capability {_HOPPER}, a Hopper GPU, and this one has {capability}"
    if reason:
        raise ValueError(f"model.attention = 'cudnn' {reason}; or use flash")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def packed_attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch time kv_heads head_dim"],
    v: Float[Array, "batch time kv_heads head_dim"],
    segment_ids: Int[Array, "batch time"],
    otherwise: Attention,
) -> Float[Array, "batch time heads head_dim"]:
    """Attend within each run of equal ids: the tokens of a segment are neighbours.

    Key heads are not repeated. The backward pass adds up in any order, unless XLA is told to be
    deterministic (`--xla_gpu_deterministic_ops`).

    Args:
      otherwise: computes the same of the same arguments, for rows of more segments than the program
        has room for (`segments_a_row`).
    """
    segments = find_segments(segment_ids, segments_a_row(q.shape[1]))
    return _attend(q, k, v, segment_ids, segments, otherwise, keep=False)[0]


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    segments: Segments,
    otherwise: Attention,
    *,
    keep: bool,
) -> tuple[jax.Array, ...]:
    def by_cudnn() -> tuple[jax.Array, ...]:
        return forward(q, k, v, segments, keep=keep)

    shapes = jax.eval_shape(by_cudnn)

    def by_another() -> tuple[jax.Array, ...]:
        unused = (jnp.zeros(x.shape, x.dtype) for x in shapes[1:])
        return (otherwise(q, k, v, segment_ids), *unused)

    with jax.named_scope(CUDNN_ATTENTION):
        return jax.lax.cond(segments.fit, by_cudnn, by_another)


class _Saved(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    segments: Segments
    out: jax.Array
    statistics: jax.Array


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, otherwise: Attention
) -> tuple[jax.Array, _Saved]:
    segments = find_segments(segment_ids, segments_a_row(q.shape[1]))
    out, statistics = (
        checkpoint_name(x, KEPT_OF_ATTENTION)
        for x in _attend(q, k, v, segment_ids, segments, otherwise, keep=True)
    )
    return out, _Saved(q, k, v, segment_ids, segments, out, statistics)


def _attend_backward(
    otherwise: Attention, saved: _Saved, d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, k, v, segment_ids, segments, out, statistics = saved

    def by_cudnn() -> tuple[jax.Array, ...]:
        return backward(q, k, v, segments, (out, statistics), d_out)

    def by_another() -> tuple[jax.Array, ...]:
        _, vjp = jax.vjp(lambda q, k, v: otherwise(q, k, v, segment_ids), q, k, v)
        return tuple(vjp(d_out))

    with jax.named_scope(CUDNN_ATTENTION):
        return (*jax.lax.cond(segments.fit, by_cudnn, by_another), None)


packed_attention.defvjp(_attend_forward, _attend_backward)


def operands(q: jax.Array, k: jax.Array, segments: Segments) -> tuple[jax.Array, ...]:
    """Lengths of queries and of keys, then their offsets, which cuDNN counts in numbers."""
    offsets = (segments.starts * math.prod(x.shape[2:]) for x in (q, k))
    return (segments.lengths, segments.lengths, *offsets)


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments, *, keep: bool
) -> tuple[jax.Array, ...]:
    """The output, and with `keep` what the backward pass wants of the softmax."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    unused = jnp.zeros(0, q.dtype)  # a bias, tables of pages of keys and of values
    return tuple(
        fused._dot_product_attention_fwd_p.bind(
            *(q, k, v, unused),
            *operands(q, k, segments),
            *(unused, unused),
            is_training=keep,
            **_parameters(q),
        )
    )


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    saved: tuple[jax.Array, jax.Array],
    d_out: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients for q, k and v. saved: the output, and what `forward` kept."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    out, statistics = saved
    unused = jnp.zeros(0, q.dtype)
    return tuple(
        fused._dot_product_attention_bwd_p.bind(
            *(q, k, v, unused),
            *operands(q, k, segments),
            *(unused, unused, statistics, out, d_out),
            **_parameters(q),
        )
    )


def _parameters(q: jax.Array) -> dict[str, object]:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    return {
        "scale": 1 / math.sqrt(q.shape[3]),
        "seed": 42,  # of the dropout that there is not
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": fused.MaskType.PADDING_CAUSAL,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
