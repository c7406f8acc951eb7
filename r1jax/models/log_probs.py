"""Log-probabilities and entropies of given tokens, in chunks over time.

The logits of a whole batch are the largest array of a language model's train step
(128 x 4096 x 152,000 floats are 319 GB) and nothing needs them at once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from r1jax.models.decoder import Decoder, Routings, forward_routed, unembedding
from r1jax.models.parameters import Params
from r1jax.sharding import Layout

_NO_WORD = -1e30  # finite: times a weight of 0 it is 0


class TokenScores(NamedTuple):
    """Per token, float32 [batch, time]. The entropy carries no gradient."""

    log_probs: jax.Array
    entropy: jax.Array


class HiddenScores(NamedTuple):
    """As `TokenScores`, and the most likely token, int32 [batch, time], where it was asked for."""

    log_probs: jax.Array
    entropy: jax.Array
    best: jax.Array | None


def score_hidden(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    *,
    chunk: int,
    temperature: jax.Array | float = 1.0,
    layout: Layout | None = None,
    best: bool = False,
) -> HiddenScores:
    """log softmax(hidden @ matrix / temperature)[targets], `chunk` time steps at once.

    Each chunk's logits are recomputed in the backward pass.

    Args:
      hidden: [batch, time, hidden].
      matrix: [hidden, vocab].
      targets: int32 [batch, time].
      layout: how `hidden` is split over devices along ("batch", "time"); default: it is not.
      best: find the most likely tokens, too.
    """
    score = partial(_score_rows, chunk=chunk, best=best)
    temperature = jnp.asarray(temperature, jnp.float32)
    if layout is None or layout.shards("batch") * layout.shards("time") == 1:
        return score(hidden, matrix, targets, temperature)
    rows, table = layout.spec(("batch", "time")), dict(layout.rules)
    # Each device scores its own tokens. Left to itself, the compiler sums the matrix's gradient
    # over the devices in every chunk; here it leaves a device once. Axes that split the vocabulary
    # stay the compiler's. Devices that share a row, though, score it together, with a part of the
    # vocabulary each: none has to hold the whole matrix and its gradient in float32, 3.5 GiB each
    # of DeepSeek-V3's.
    words, parts = matrix.shape[1], layout.shards("time")
    along = table["time"] if parts > 1 else ()
    matrix = jnp.pad(matrix, ((0, 0), (0, -words % parts)))
    first = jnp.arange(parts, dtype=jnp.int32) * (matrix.shape[1] // parts)

    def score_part(
        hidden: jax.Array, matrix: jax.Array, targets: jax.Array, first: jax.Array, heat: jax.Array
    ) -> HiddenScores:
        part = _Part(first[0], words, along) if along else None
        return score(hidden, matrix, targets, heat, part=part)

    return jax.shard_map(
        score_part,
        mesh=layout.mesh,
        in_specs=(rows, PartitionSpec(None, along), rows, PartitionSpec(along), PartitionSpec()),
        out_specs=rows,
        axis_names={*table["batch"], *table["time"]},
        check_vma=False,
    )(hidden, matrix, targets, first, temperature)


class _Part(NamedTuple):
    """Of a vocabulary that devices share: the first word of this one's part, all words, and the
    mesh axes of the devices, which have other tokens of the same rows."""

    first: jax.Array
    words: int
    along: tuple[str, ...]


def _score_rows(
    hidden: jax.Array,
    matrix: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    *,
    chunk: int,
    best: bool,
    part: _Part | None = None,
) -> HiddenScores:
    batch, time, width = hidden.shape
    chunk = min(chunk, time)
    padded = -(-time // chunk) * chunk
    wide = matrix.astype(jnp.float32)  # so that the chunks' gradients are summed in float32
    hidden = jnp.pad(hidden, ((0, 0), (0, padded - time), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padded - time)))

    @jax.checkpoint
    def score(hidden: jax.Array, targets: jax.Array) -> HiddenScores:
        narrow = wide.astype(matrix.dtype)
        if part is not None:
            # Everyone's tokens of the chunk, for the words of this device.
            hidden, targets = (
                jax.lax.all_gather(x, part.along, axis=1, tiled=True) for x in (hidden, targets)
            )
        raw = jnp.matmul(hidden, narrow, preferred_element_type=jnp.float32) / temperature
        return _scores(raw, targets, best) if part is None else _joint(raw, targets, part, best)

    if padded == chunk:
        scores = score(hidden, targets)
    else:
        hidden = hidden.reshape(batch, padded // chunk, chunk, width).swapaxes(0, 1)
        targets = targets.reshape(batch, padded // chunk, chunk).swapaxes(0, 1)
        _, scores = jax.lax.scan(lambda _, xs: (None, score(*xs)), None, (hidden, targets))
        scores = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, padded), scores)
    return jax.tree.map(lambda x: x[:, :time], scores)


def _scores(raw: jax.Array, targets: jax.Array, best: bool) -> HiddenScores:
    """Of logits [batch, time, vocab]."""
    total = jax.nn.logsumexp(raw, axis=-1)
    chosen = jnp.take_along_axis(raw, targets[..., None], axis=-1)[..., 0]
    frozen, frozen_total = jax.lax.stop_gradient((raw, total))
    mean = jnp.sum(jnp.exp(frozen - frozen_total[..., None]) * frozen, axis=-1)
    likely = jnp.argmax(frozen, axis=-1).astype(jnp.int32) if best else None
    return HiddenScores(chosen - total, frozen_total - mean, likely)


def _joint(raw: jax.Array, targets: jax.Array, part: _Part, best: bool) -> HiddenScores:
    """As `_scores` of all parts' logits, for this device's tokens.

    Args:
      raw: [batch, all devices' time, part of vocab]. targets: int32 [batch, all devices' time].
    """
    words = part.first + jnp.arange(raw.shape[-1], dtype=jnp.int32)
    raw = jnp.where(words < part.words, raw, _NO_WORD)
    frozen = jax.lax.stop_gradient(raw)
    top = jax.lax.pmax(jnp.max(frozen, axis=-1), part.along)

    def summed(x: jax.Array) -> jax.Array:
        """Over the parts, of this device's tokens."""
        return jax.lax.psum_scatter(x, part.along, scatter_dimension=1, tiled=True)

    def mine(x: jax.Array) -> jax.Array:
        """What all devices know alike, of this device's tokens."""
        count, index = x.shape[1] // jax.lax.axis_size(part.along), part.first // raw.shape[-1]
        return jax.lax.dynamic_slice_in_dim(x, index * count, count, axis=1)

    weights = jnp.exp(raw - top[..., None])
    weight, peak = summed(jnp.sum(weights, axis=-1)), mine(top)
    place = targets - part.first
    inside = (place >= 0) & (place < raw.shape[-1])
    place = jnp.clip(place, 0, raw.shape[-1] - 1)
    chosen = jnp.take_along_axis(raw, place[..., None], axis=-1)[..., 0]
    chosen = summed(jnp.where(inside, chosen, 0))
    total = jnp.log(weight) + peak
    mean = summed(jnp.sum(jax.lax.stop_gradient(weights) * frozen, axis=-1))
    mean = mean / jax.lax.stop_gradient(weight)
    likely = None
    if best:
        # The first of the best, as argmax has it.
        found = words[jnp.argmax(frozen, axis=-1)]
        found = jnp.where(jnp.max(frozen, axis=-1) == top, found, part.words)
        likely = mine(jax.lax.pmin(found, part.along))
    return HiddenScores(chosen - total, jax.lax.stop_gradient(total) - mean, likely)


def token_scores(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
    *,
    temperature: jax.Array | float = 1.0,
    experts: jax.Array | None = None,
) -> TokenScores:
    """Score each token given the tokens before it in its segment.

    Args:
      tokens, positions, segment_ids: int32 [batch, time].
      temperature: the policy is softmax(logits / temperature).
      experts: of each token, in place of a choice; see `forward_routed`.

    Returns:
      Scores [batch, time]; entry t is about tokens[:, t]. The first token of a segment and
      padding, about which the model says nothing, have 0.
    """
    rows = (tokens, positions, segment_ids)
    return routed_scores(params, *rows, model, temperature=temperature, experts=experts)[0]


def routed_scores(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
    *,
    temperature: jax.Array | float = 1.0,
    experts: jax.Array | None = None,
    balance: bool = False,
) -> tuple[TokenScores, Routings]:
    """As `token_scores`, with what the routers did; see `forward_routed`."""
    hidden, routings = forward_routed(
        params, tokens, positions, segment_ids, model, experts=experts, balance=balance
    )
    scores = scores_ahead(params, hidden, tokens, segment_ids, model, temperature=temperature)
    return TokenScores(scores.log_probs, scores.entropy), routings


def scores_ahead(
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    segment_ids: jax.Array,
    model: Decoder,
    *,
    ahead: int = 1,
    temperature: jax.Array | float = 1.0,
    best: bool = False,
) -> HiddenScores:
    """Score each token by the activations of `ahead` tokens before it.

    Args:
      hidden: [batch, time, hidden], normalised.
      tokens, segment_ids: int32 [batch, time].
      best: as of `score_hidden`.

    Returns:
      Scores [batch, time]; entry t is about tokens[:, t], and 0 where `follows` is false.
    """
    # The last steps' targets are any tokens: rows keep their length, which divides over devices.
    scores = score_hidden(
        hidden,
        unembedding(params, model),
        jnp.roll(tokens, -ahead, axis=1),
        chunk=model.execution.log_prob_chunk,
        temperature=temperature,
        layout=model.layout,
        best=best,
    )
    said = follows(segment_ids, ahead)
    return jax.tree.map(lambda x: jnp.where(said, jnp.roll(x, ahead, axis=1), 0), scores)


def follows(segment_ids: jax.Array, ahead: int = 1) -> jax.Array:
    """Whether a token has `ahead` others before it in its segment, bool [batch, time]."""
    same = (segment_ids[:, ahead:] == segment_ids[:, :-ahead]) & (segment_ids[:, ahead:] != 0)
    return jnp.pad(same, ((0, 0), (ahead, 0)))
