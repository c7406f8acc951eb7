"""Log-probabilities and entropies of given tokens, in chunks over time.

The logits of a whole batch are the largest array of a language model's train step
(128 x 4096 x 152,000 floats are 319 GB) and nothing needs them at once.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from r1jax.models.config import Decoder
from r1jax.models.decoder import Routings, TokenRows, forward, unembedding
from r1jax.models.parameters import Params
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    Temperature = Float[Array, ""] | float

_NO_TOKEN = -1e30  # finite: times a weight of 0 it is 0


class TokenLogProbs(NamedTuple):
    """Per token, float32; 0 for the first token of a segment and for padding.

    entropy: of the distribution that the token is drawn from; it carries no gradient.
    routings: of the routers; empty without experts.
    """

    log_probs: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]
    routings: Routings


class TargetLogProbs(NamedTuple):
    """Of target tokens, float32; the entropy carries no gradient.

    most_likely: the most likely token in place of the target, or None.
    """

    log_probs: Float[Array, "batch time"]
    entropy: Float[Array, "batch time"]
    most_likely: Int[Array, "batch time"] | None


def token_log_probs(
    params: Params,
    rows: TokenRows,
    model: Decoder,
    *,
    temperature: Temperature = 1.0,
    balance: bool = False,
) -> TokenLogProbs:
    """The log-prob of each token given the tokens before it in its segment.

    Args:
      temperature: the policy is softmax(logits / temperature).
      balance: as of `forward`.
    """
    output = forward(params, rows, model, balance=balance)
    targets = log_probs_ahead(params, output.hidden, rows, model, temperature=temperature)
    return TokenLogProbs(targets.log_probs, targets.entropy, output.routings)


def log_probs_ahead(
    params: Params,
    hidden: Float[Array, "batch time hidden"],
    rows: TokenRows,
    model: Decoder,
    *,
    ahead: int = 1,
    temperature: Temperature = 1.0,
    most_likely: bool = False,
) -> TargetLogProbs:
    """The log-prob of each token by the activations of the token `ahead` places before it.

    Args:
      hidden: normalised.

    Returns:
      Entry t is about token t, and 0 where `follows` is false.
    """
    # The last steps' targets are any tokens: rows keep their length, which divides over devices.
    targets = chunked_log_probs(
        hidden,
        unembedding(params, model),
        jnp.roll(rows.tokens, -ahead, axis=1),
        chunk=model.execution.log_prob_chunk,
        temperature=temperature,
        layout=model.layout,
        most_likely=most_likely,
    )
    predicted = follows(rows.segment_ids, ahead)
    return jax.tree.map(lambda x: jnp.where(predicted, jnp.roll(x, ahead, axis=1), 0), targets)


def follows(segment_ids: Int[Array, "batch time"], ahead: int = 1) -> Bool[Array, "batch time"]:
    """Whether a token has `ahead` others before it in its segment."""
    same = (segment_ids[:, ahead:] == segment_ids[:, :-ahead]) & (segment_ids[:, ahead:] != 0)
    return jnp.pad(same, ((0, 0), (ahead, 0)))


def chunked_log_probs(
    hidden: Float[Array, "batch time hidden"],
    matrix: Float[Array, "hidden vocab"],
    targets: Int[Array, "batch time"],
    *,
    chunk: int,
    temperature: Temperature = 1.0,
    layout: Layout | None = None,
    most_likely: bool = False,
) -> TargetLogProbs:
    """log softmax(hidden @ matrix / temperature)[targets], `chunk` time steps at once.

    Each chunk's logits are recomputed in the backward pass.

    Args:
      layout: how `hidden` is split over devices along ("batch", "time"); default: it is not.
      most_likely: return the most likely tokens, too.
    """
    compute = partial(_device_log_probs, chunk=chunk, most_likely=most_likely)
    temperature = jnp.asarray(temperature, jnp.float32)
    if layout is None or layout.shards("batch") * layout.shards("time") == 1:
        return compute(hidden, matrix, targets, temperature)
    batch_time, table = layout.spec(("batch", "time")), dict(layout.rules)
    # Each device computes the log-probs of its tokens. Without this, the compiler sums the matrix's
    # gradient over the devices in every chunk; here it leaves a device once. Axes that split the
    # vocabulary stay the compiler's. But devices that share a row compute its log-probs together,
    # with a part of the vocabulary each: none has to hold the whole matrix and its gradient in
    # float32, 3.5 GiB each of DeepSeek-V3's.
    vocab, parts = matrix.shape[1], layout.shards("time")
    time_axes = table["time"] if parts > 1 else ()
    matrix = jnp.pad(matrix, ((0, 0), (0, -vocab % parts)))
    first = jnp.arange(parts, dtype=jnp.int32) * (matrix.shape[1] // parts)

    def compute_part(
        hidden: jax.Array,
        matrix: jax.Array,
        targets: jax.Array,
        first: jax.Array,
        temperature: jax.Array,
    ) -> TargetLogProbs:
        part = _VocabPart(first[0], vocab, time_axes) if time_axes else None
        return compute(hidden, matrix, targets, temperature, part=part)

    split_vocab = PartitionSpec(None, time_axes), PartitionSpec(time_axes)
    return jax.shard_map(
        compute_part,
        mesh=layout.mesh,
        in_specs=(batch_time, split_vocab[0], batch_time, split_vocab[1], PartitionSpec()),
        out_specs=batch_time,
        axis_names={*table["batch"], *table["time"]},
        check_vma=False,
    )(hidden, matrix, targets, first, temperature)


class _VocabPart(NamedTuple):
    """Of a vocabulary split over devices that have other tokens of the same rows.

    first: token id that this device's part begins with. vocab: size of the whole.
    axes: mesh axes of the devices.
    """

    first: jax.Array
    vocab: int
    axes: tuple[str, ...]


def _device_log_probs(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    *,
    chunk: int,
    most_likely: bool,
    part: _VocabPart | None = None,
) -> TargetLogProbs:
    batch, time, width = hidden.shape
    chunk = min(chunk, time)
    padded = -(-time // chunk) * chunk
    wide = matrix.astype(jnp.float32)  # so that the chunks' gradients are summed in float32
    hidden = jnp.pad(hidden, ((0, 0), (0, padded - time), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padded - time)))

    @jax.checkpoint
    def compute(hidden: jax.Array, targets: jax.Array) -> TargetLogProbs:
        narrow = wide.astype(matrix.dtype)
        if part is not None:
            # All devices' tokens of the chunk, for this device's part of the vocabulary.
            hidden, targets = (
                jax.lax.all_gather(x, part.axes, axis=1, tiled=True) for x in (hidden, targets)
            )
        logits = jnp.matmul(hidden, narrow, preferred_element_type=jnp.float32) / temperature
        if part is None:
            return _from_logits(logits, targets, most_likely)
        return _from_partial_logits(logits, targets, part, most_likely)

    if padded == chunk:
        results = compute(hidden, targets)
    else:
        hidden = hidden.reshape(batch, padded // chunk, chunk, width).swapaxes(0, 1)
        targets = targets.reshape(batch, padded // chunk, chunk).swapaxes(0, 1)
        _, results = jax.lax.scan(lambda _, xs: (None, compute(*xs)), None, (hidden, targets))
        results = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, padded), results)
    return jax.tree.map(lambda x: x[:, :time], results)


def _from_logits(logits: jax.Array, targets: jax.Array, most_likely: bool) -> TargetLogProbs:
    """Of logits [batch, time, vocab]."""
    total = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    frozen, frozen_total = jax.lax.stop_gradient((logits, total))
    mean = jnp.sum(jnp.exp(frozen - frozen_total[..., None]) * frozen, axis=-1)
    best = jnp.argmax(frozen, axis=-1).astype(jnp.int32) if most_likely else None
    return TargetLogProbs(target - total, frozen_total - mean, best)


def _from_partial_logits(
    logits: jax.Array, targets: jax.Array, part: _VocabPart, most_likely: bool
) -> TargetLogProbs:
    """As `_from_logits` of all parts' logits, for this device's tokens.

    Args:
      logits: [batch, all devices' time, part of vocab].
      targets: int32 [batch, all devices' time].
    """
    ids = part.first + jnp.arange(logits.shape[-1], dtype=jnp.int32)
    logits = jnp.where(ids < part.vocab, logits, _NO_TOKEN)
    frozen = jax.lax.stop_gradient(logits)
    peaks = jax.lax.pmax(jnp.max(frozen, axis=-1), part.axes)

    def summed(x: jax.Array) -> jax.Array:
        """The sum over the parts, of this device's tokens."""
        return jax.lax.psum_scatter(x, part.axes, scatter_dimension=1, tiled=True)

    def local(x: jax.Array) -> jax.Array:
        """Of what is equal on all devices, this device's tokens."""
        count, index = x.shape[1] // jax.lax.axis_size(part.axes), part.first // logits.shape[-1]
        return jax.lax.dynamic_slice_in_dim(x, index * count, count, axis=1)

    weights = jnp.exp(logits - peaks[..., None])
    weight, peak = summed(jnp.sum(weights, axis=-1)), local(peaks)
    index = targets - part.first
    inside = (index >= 0) & (index < logits.shape[-1])
    index = jnp.clip(index, 0, logits.shape[-1] - 1)
    target = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    target = summed(jnp.where(inside, target, 0))
    total = jnp.log(weight) + peak
    mean = summed(jnp.sum(jax.lax.stop_gradient(weights) * frozen, axis=-1))
    mean = mean / jax.lax.stop_gradient(weight)
    best = None
    if most_likely:
        # The first of the most likely, as argmax has it.
        best = ids[jnp.argmax(frozen, axis=-1)]
        best = jnp.where(jnp.max(frozen, axis=-1) == peaks, best, part.vocab)
        best = local(jax.lax.pmin(best, part.axes))
    return TargetLogProbs(target - total, jax.lax.stop_gradient(total) - mean, best)
