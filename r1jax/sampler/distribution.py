"""The distribution that tokens are drawn from, and keys that do not depend on the batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Key

    Real = Float[Array, "*batch"] | float
    Whole = Int[Array, "*batch"] | int

_REMOVED = -1e30


@struct.dataclass
class Sampling:
    """Sampling parameters as scalars or [batch] arrays, so that a change compiles nothing.

    temperature: 0 is greedy. top_p: 1 is off. top_k: 0 is off. min_p: 0 is off.
    """

    temperature: Real = 1.0
    top_p: Real = 1.0
    top_k: Whole = 0
    min_p: Real = 0.0


def filter_logits(
    logits: Float[Array, "batch samples vocab"], sampling: Sampling
) -> Float[Array, "batch samples vocab"]:
    """Temperature, then top-k, top-p and min-p in transformers' order.

    Ties with the last kept logit are kept. Sorting is skipped at run time unless a filter is on.

    Args:
      logits: in float32.

    Returns:
      The sampling distribution's unnormalised log-probs.
    """

    temperature = _column(sampling.temperature)
    top_p, top_k, min_p = map(_column, (sampling.top_p, sampling.top_k, sampling.min_p))
    scaled = logits / jnp.where(temperature == 0, 1.0, temperature)
    vocab = logits.shape[-1]

    def by_rank(scaled: jax.Array) -> jax.Array:
        ordered = -jnp.sort(-scaled, axis=-1)
        k = jnp.where(top_k == 0, vocab, jnp.clip(top_k, 1, vocab))
        ordered = jnp.where(jnp.arange(vocab) < k, ordered, _REMOVED)
        probs = jax.nn.softmax(ordered, axis=-1)
        # A token is kept while the mass before it is below top_p: the first always is.
        kept = (jnp.cumsum(probs, axis=-1) - probs < top_p) & (ordered > _REMOVED)
        lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(scaled >= lowest, scaled, _REMOVED)

    ranked = jnp.any(top_p < 1) | jnp.any(top_k > 0)
    filtered = jax.lax.cond(ranked, by_rank, lambda x: x, scaled)
    best = jnp.max(filtered, axis=-1, keepdims=True)
    floor = jnp.where(min_p > 0, best + jnp.log(jnp.maximum(min_p, 1e-30)), -jnp.inf)
    filtered = jnp.where(filtered >= floor, filtered, _REMOVED)
    peak = jax.nn.one_hot(jnp.argmax(logits, axis=-1), vocab, dtype=bool)
    return jnp.where(temperature == 0, jnp.where(peak, 0.0, _REMOVED), filtered)


def _column(value: Real | Whole) -> jax.Array:
    """A parameter such that it broadcasts against [batch, samples, vocab]."""
    array = jnp.asarray(value)
    return array.reshape(array.shape + (1,) * (3 - array.ndim)) if array.ndim else array


def draw(
    logits: Float[Array, "batch samples vocab"],
    keys: Key[Array, "batch samples"],
    position: Int[Array, "*batch_samples"],
    sampling: Sampling,
) -> tuple[
    Int[Array, "batch samples"], Float[Array, "batch samples"], Float[Array, "batch samples"]
]:
    """Draw one token per sample.

    Args:
      logits: in float32.
      keys: from `sample_keys`.
      position: the index of the new token, folded into the keys; a scalar, or [batch, samples].

    Returns:
      Tokens, the log-prob under the policy softmax(logits / temperature) (temperature 1 when
      greedy), and the log-prob under the filtered distribution that it was drawn from.
    """
    uniforms = _uniforms(keys, position, 2)

    def with_filters(logits: jax.Array) -> tuple[jax.Array, ...]:
        filtered = filter_logits(logits, sampling)
        tokens = draw_filtered(filtered, uniforms)
        return tokens, *drawn_log_probs(tokens, logits, filtered, sampling)

    def without(logits: jax.Array) -> tuple[jax.Array, ...]:
        return _draw_unfiltered(logits, uniforms, sampling)

    # A branch gives what it has drawn: one that gave logits would copy them.
    tokens, policy, drawn = jax.lax.cond(_filters(sampling), with_filters, without, logits)
    return tokens, policy, drawn


def _filters(sampling: Sampling) -> Bool[Array, ""]:
    """Whether any row has a filter that is on."""
    on = (jnp.any(sampling.top_p < 1), jnp.any(sampling.top_k > 0), jnp.any(sampling.min_p > 0))
    return on[0] | on[1] | on[2]


def _draw_unfiltered(
    logits: Float[Array, "batch samples vocab"],
    uniforms: Float[Array, "batch samples 2"],
    sampling: Sampling,
) -> tuple[
    Int[Array, "batch samples"], Float[Array, "batch samples"], Float[Array, "batch samples"]
]:
    """As `draw` where no filter is on, in two passes over the logits: maxima, sums of exp.

    A block of the vocabulary is drawn by its sum, and its logits alone are read again.
    """
    greedy = jnp.broadcast_to(_column(sampling.temperature) == 0, (*logits.shape[:-1], 1))
    temperature = jnp.where(greedy, 1.0, _column(sampling.temperature))
    blocks = _blocks(logits, -jnp.inf)
    peaks = jnp.max(blocks, axis=-1)
    best = jnp.max(peaks, axis=-1, keepdims=True) / temperature  # division by it is monotone
    sums = jnp.sum(jnp.exp(blocks / temperature[..., None] - best[..., None]), axis=-1)
    greedy = greedy[..., 0]
    block = jnp.where(greedy, _argmax(peaks), _first_above(sums, uniforms[..., 0]))
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    scaled = inside / temperature - best  # at most 0
    entry = jnp.where(greedy, _argmax(inside), _first_above(jnp.exp(scaled), uniforms[..., 1]))
    drawn = jnp.take_along_axis(scaled, entry[..., None], axis=-1)[..., 0]
    log_prob = drawn - jnp.log(jnp.sum(sums, axis=-1))
    return block * blocks.shape[-1] + entry, log_prob, jnp.where(greedy, 0.0, log_prob)


def _argmax(values: jax.Array) -> jax.Array:
    """The first index of the highest value, int32 [...]."""
    return jnp.argmax(values, axis=-1).astype(jnp.int32)


def draw_filtered(
    filtered: Float[Array, "batch samples vocab"], uniforms: Float[Array, "batch samples 2"]
) -> Int[Array, "batch samples"]:
    """Tokens of the distribution that `filter_logits` gives, from numbers in [0, 1)."""
    best = jnp.max(filtered, axis=-1, keepdims=True)
    return _inverse_cdf(jnp.exp(filtered - best), uniforms)


def drawn_log_probs(
    tokens: Int[Array, "batch samples"],
    logits: Float[Array, "batch samples vocab"],
    filtered: Float[Array, "batch samples vocab"],
    sampling: Sampling,
) -> tuple[Float[Array, "batch samples"], Float[Array, "batch samples"]]:
    """Log-probs of tokens under the policy, and under the filtered distribution."""
    temperature = jnp.asarray(sampling.temperature)
    temperature = jnp.where(temperature == 0, 1.0, temperature)
    if temperature.ndim:
        temperature = temperature[:, None, None]
    scaled = logits / temperature

    def at_token(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, tokens[..., None], axis=-1)[..., 0]

    policy = at_token(scaled) - jax.nn.logsumexp(scaled, axis=-1)
    best = jnp.max(filtered, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(filtered - best), axis=-1)
    return policy, at_token(filtered) - best[..., 0] - jnp.log(total)


def draft_and_verify_uniforms(
    keys: Key[Array, "batch samples"], position: Int[Array, "*batch_samples"]
) -> tuple[
    Float[Array, "batch samples 2"], Float[Array, "batch samples"], Float[Array, "batch samples 2"]
]:
    """Numbers in [0, 1) for `draw_filtered` of a draft, for accepting it, and for a replacement.

    All are independent of each other and of those at other positions.

    Args:
      keys, position: as of `draw`.
    """
    five = _uniforms(keys, position, 5)
    return five[..., :2], five[..., 2], five[..., 3:]


def verify(
    drafts: Int[Array, "batch samples"],
    draft_filtered: Float[Array, "batch samples vocab"],
    filtered: Float[Array, "batch samples vocab"],
    accept_uniform: Float[Array, "batch samples"],
    replace_uniforms: Float[Array, "batch samples 2"],
) -> tuple[Int[Array, "batch samples"], Bool[Array, "batch samples"]]:
    """Accept a draft or draw another token, such that the result is distributed as `filtered`.

    With p of the model and q of the draft, a draft x is accepted with probability min(1, p(x) /
    q(x)), and else replaced by a draw from max(0, p - q), normalised (arXiv 2211.17192, section
    2.3).

    Args:
      drafts: drawn from `draft_filtered`.
      draft_filtered, filtered: from `filter_logits` of the draft's and of the model's logits.
      accept_uniform, replace_uniforms: numbers in [0, 1).

    Returns:
      Tokens, and whether they are the drafts.
    """
    p, q = jax.nn.softmax(filtered, axis=-1), jax.nn.softmax(draft_filtered, axis=-1)
    of_p, of_q = (jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0] for x in (p, q))
    accepted = accept_uniform * of_q < of_p
    rest = jnp.maximum(p - q, 0.0)
    # Two equal distributions may differ by rounding alone, and leave nothing to draw from.
    rest = jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, p)
    return jnp.where(accepted, drafts, _inverse_cdf(rest, replace_uniforms)), accepted


def _uniforms(keys: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """Numbers in [0, 1) for each key and position, float32 [..., count]."""

    def uniforms(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), (count,))

    return jax.vmap(jax.vmap(uniforms))(keys, jnp.broadcast_to(position, keys.shape))


def _inverse_cdf(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """An index with probability proportional to its weight, int32 [...].

    The vocabulary is cut into blocks: one number picks a block by its sum, the other a token of
    the block. That takes two numbers a token where Gumbel noise takes one per vocabulary entry,
    sums few enough terms to stay exact in float32, and resolves probabilities down to 2^-46.

    Args:
      weights: float32 [..., vocab], not negative, some positive. 0 is never drawn.
      uniforms: [..., 2] in [0, 1).
    """
    blocks = _blocks(weights, 0.0)
    block = _first_above(jnp.sum(blocks, axis=-1), uniforms[..., 0])
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * blocks.shape[-1] + _first_above(inside, uniforms[..., 1])


def _blocks(values: jax.Array, rest: float) -> jax.Array:
    """[..., vocab] -> [..., blocks, width], about as many as they are wide; `rest` behind them."""
    vocab = values.shape[-1]
    width = math.isqrt(vocab - 1) + 1
    count = -(-vocab // width)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, count * width - vocab)]
    padded = jnp.pad(values, padding, constant_values=rest)
    return padded.reshape(*values.shape[:-1], count, width)


def _first_above(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index whose cumulated weight exceeds uniform * total; its weight is positive."""
    ends = jnp.cumsum(weights, axis=-1)
    # Below the last end in float32, too: the largest uniform is 1 - 2^-24, and a total that much
    # smaller is at least half a unit in its last place away.
    target = uniform * ends[..., -1]
    return jnp.sum(ends <= target[..., None], axis=-1, dtype=jnp.int32)
