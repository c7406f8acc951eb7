"""The mixture of experts of DeepSeek-V2 and V3 (arXiv 2412.19437, section 2.1.2), dropless.

A token's experts and its result depend on nothing but the token: prefill, decoding and training
give the same, on one device or many.

Devices along the mesh axes of "expert" hold different experts. A token's activations travel to the
devices of its experts and back, in buffers of a fixed size: a device has room for so many of every
other one, and where some expert is asked for more often, all go again. So nothing is dropped,
shapes are static, and no device ever has to hold what all others might send it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from r1jax.models.balance import sequence_imbalance
from r1jax.models.config import Execution, MixtureOfExperts
from r1jax.models.grouped_product import grouped_product
from r1jax.models.parameters import Params
from r1jax.models.primitives import swiglu
from r1jax.sharding import Axes, Layout

_LEAST_ROOM = 16  # rows that a device has room for of each other one, however few there are


class Routing(NamedTuple):
    """What the router of a layer did; of several layers, with a dimension before the others.

    chosen: int [batch, time or samples, k], the experts of each token, best first; of the smallest
        type that holds them.
    load: float32 [experts], how many tokens of the whole batch chose each.
    imbalance: float32 [batch], `sequence_imbalance`, where it was asked for; else 0.
    """

    chosen: jax.Array
    load: jax.Array
    imbalance: jax.Array


def mixture_of_experts(
    x: jax.Array,
    w: Params,
    experts: MixtureOfExperts,
    execution: Execution,
    layout: Layout,
    *,
    axes: Axes,
    segment_ids: jax.Array | None = None,
    replayed: jax.Array | None = None,
    balance: bool = False,
) -> tuple[jax.Array, Routing]:
    """The routed experts' weighted sum plus the shared expert, as x, and what the router did.

    Args:
      x: [batch, time or samples, hidden].
      w: a layer's weights in the dtype of x, a `router_bias` in float32.
      axes: logical axes of the first two dimensions of x.
      segment_ids: int32 [batch, time]; 0 is padding, which would all go to the same experts, and
        goes to none. Default: there is none.
      replayed: int [batch, time, k], experts that were chosen before, in place of a choice.
      balance: work out the imbalance of each segment.
    """
    split = layout.mesh.size > 1
    table = {name: along if split else () for name, along in layout.rules}
    spread = tuple(axis for name in axes if name is not None for axis in table[name])
    exchange = Exchange(
        layout.shards("expert"),
        execution.expert_chunk,
        table["expert"],
        tuple(layout.mesh.axis_names) if split else (),
    )
    segments = x.shape[1] + 1

    def local(of_tokens: dict[str, jax.Array], router: Params, weights: Params) -> Any:
        x, ids = of_tokens["x"], of_tokens["segment_ids"]
        tokens, before = x.reshape(-1, x.shape[-1]), of_tokens.get("replayed")
        if before is not None:
            before = before.reshape(len(tokens), -1).astype(jnp.int32)
        found = route(tokens, router["router"], router.get("router_bias"), experts, before)
        # Gathered here, so that their gradients are scattered, rather than summed everywhere.
        weights = {
            name: _gather(leaf, table["expert_embed"], _EMBED[name])
            for name, leaf in weights.items()
        }
        going = jnp.where(ids.reshape(-1, 1) != 0, found.chosen, experts.n_routed_experts)
        routed = run_experts(tokens, going, found.weights, weights, exchange)
        routed = _total(routed, table["mlp"]).reshape(x.shape)
        load = jnp.bincount(going.reshape(-1), length=experts.n_routed_experts)
        imbalance = jnp.zeros(len(x), jnp.float32)
        if balance:
            imbalance = sequence_imbalance(
                found.scores.reshape(*ids.shape, -1),
                ids,
                experts.num_experts_per_tok,
                segments=segments,
                total=lambda parts: _total(parts, table[str(axes[1])]),
            )
        return routed, Routing(
            found.chosen.astype(experts.index_dtype).reshape(*ids.shape, -1),
            _total(load.astype(jnp.float32), spread),
            imbalance,
        )

    of_tokens = {
        "x": x,
        "segment_ids": jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids,
        **({} if replayed is None else {"replayed": replayed}),
    }
    router: Params = {name: w[name] for name in ("router", "router_bias") if name in w}
    weights = {name: w[name] for name in _EMBED}
    if split:
        rows = layout.spec(axes)
        of_routing: tuple[Any, ...] = (rows, PartitionSpec(), layout.spec(axes[:1]))
        of_weights = {
            "gate": layout.spec(("expert", "expert_embed", "mlp")),
            "up": layout.spec(("expert", "expert_embed", "mlp")),
            "down": layout.spec(("expert", "mlp", "expert_embed")),
        }
        local = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(rows, PartitionSpec(), of_weights),
            out_specs=(rows, Routing(*of_routing)),
            check_vma=False,
        )
    routed, routing = local(of_tokens, router, weights)
    shared = swiglu(x, w["shared_gate"], w["shared_up"], w["shared_down"], layout)
    return routed + shared, routing


def _total(parts: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.psum(parts, axes) if axes else parts


# The experts' weights, and which dimension of each is the hidden one.
_EMBED = {"gate": 1, "up": 1, "down": 2}


def _gather(weight: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    return jax.lax.all_gather(weight, axes, axis=dimension, tiled=True) if axes else weight


class Routed(NamedTuple):
    """chosen: int32 [n, k], best first. weights: float32 [n, k]. scores: float32 [n, experts]."""

    chosen: jax.Array
    weights: jax.Array
    scores: jax.Array


def route(
    tokens: jax.Array,
    router: jax.Array,
    bias: jax.Array | None,
    experts: MixtureOfExperts,
    chosen: jax.Array | None = None,
) -> Routed:
    """Which experts a token goes to, and what they weigh; in float32.

    The bias (auxiliary-loss-free load balancing, arXiv 2408.15664) decides the choice and has no
    part in the weights, so no gradient reaches it.

    Experts of the groups that a token leaves out are masked with -inf, as in DeepSeek's inference
    code and in transformers since 5; earlier transformers masked them with 0, and so chose one of
    them over an expert whose score and bias are negative together. The two differ only then.

    Args:
      tokens: [n, hidden].
      router: [hidden, n_routed_experts].
      bias: float32 [n_routed_experts], where `experts.biased`.
      chosen: int32 [n, num_experts_per_tok], the choice, where it was made before: only weights
        are then worked out, from the present scores.
    """
    score = jax.nn.sigmoid if experts.scoring_func == "sigmoid" else jax.nn.softmax
    scores = score(tokens.astype(jnp.float32) @ router.astype(jnp.float32))
    if chosen is None:
        chosen = _choose(jax.lax.stop_gradient(scores if bias is None else scores + bias), experts)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routed(chosen, weights * experts.routed_scaling_factor, scores)


def _choose(ranking: jax.Array, experts: MixtureOfExperts) -> jax.Array:
    """The best experts of the best groups, int32 [n, k]; ranking [n, experts]."""
    if experts.topk_group < experts.n_group:
        groups = ranking.reshape(len(ranking), experts.n_group, -1)
        group_scores = jnp.sum(jax.lax.top_k(groups, experts.experts_of_a_score)[0], axis=-1)
        kept = jax.lax.top_k(group_scores, experts.topk_group)[1]
        inside = jnp.any(kept[:, :, None] == jnp.arange(experts.n_group), axis=1)
        ranking = jnp.where(inside[:, :, None], groups, -jnp.inf).reshape(ranking.shape)
    return jax.lax.top_k(ranking, experts.num_experts_per_tok)[1]


# --- To the experts and back ---------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Between which devices tokens travel to their experts.

    devices: so many have different experts, in equal parts, in the order of their index.
    chunk: tokens that a device sends at most at a time.
    axes: mesh axes that the devices are on. everyone: all mesh axes; what devices along the others
        have to do with each other is only that all go equally often.
    room: rows that a device has room for of each other one; default: as `room_for`.
    """

    devices: int
    chunk: int
    axes: tuple[str, ...] = ()
    everyone: tuple[str, ...] = ()
    room: int | None = None

    def room_for(self, rows: int) -> int:
        """Half of the rows that one device sends another if experts are used evenly, or a few.

        All go as often as the busiest pair needs: little room means little that travels empty.
        """
        if self.room is not None or self.devices == 1:
            return self.room or rows
        return min(rows, max(_LEAST_ROOM, -(-rows // (2 * self.devices))))

    def send(self, rows: jax.Array) -> jax.Array:
        """Rows [devices * room, ...] to the devices, in their order; gives what they sent."""
        return rows if self.devices == 1 else jax.lax.all_to_all(rows, self.axes, 0, 0, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def run_experts(
    tokens: jax.Array, chosen: jax.Array, share: jax.Array, weights: Params, exchange: Exchange
) -> jax.Array:
    """The weighted sum of each token's experts, [n, hidden].

    In the backward pass the tokens travel again, so that only the arguments are kept.

    Args:
      tokens: [n, hidden], this device's.
      chosen: int32 [n, k] of all devices' experts, best first; an expert that does not exist: none.
      share: float32 [n, k], what each weighs.
      weights: `gate` and `up` [experts of this device, hidden, inner], `down` [..., inner, hidden].
    """

    def chunk(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tokens, chosen, share = part
        journey = _plan(chosen, weights, exchange)

        def go(turn: jax.Array, found: jax.Array) -> jax.Array:
            rows, arrived = journey.there(turn, tokens, share)
            results = _apply(arrived.tokens, arrived.share, weights, arrived.sizes)
            return found.at[rows].set(journey.back(arrived, results), mode="drop")

        found = jnp.zeros((chosen.size, tokens.shape[1]), tokens.dtype)
        found = journey.repeat(go, found).reshape(*chosen.shape, -1)
        # A token's sum is taken from its best expert on, wherever and whenever each was found.
        return jnp.sum(found, axis=1, dtype=jnp.float32).astype(tokens.dtype)

    parts = _split(tokens, chosen, share, weights, exchange)
    sums = jax.lax.map(chunk, parts) if len(parts[0]) > 1 else chunk(_first(parts))
    return sums.reshape(-1, tokens.shape[1])[: len(tokens)]


def _forward(
    tokens: jax.Array, chosen: jax.Array, share: jax.Array, weights: Params, exchange: Exchange
) -> tuple[jax.Array, Any]:
    return run_experts(tokens, chosen, share, weights, exchange), (tokens, chosen, share, weights)


def _backward(exchange: Exchange, kept: Any, gradient: jax.Array) -> Any:
    tokens, chosen, share, weights = kept

    def chunk(of_weights: Params, part: Any) -> tuple[Params, tuple[jax.Array, jax.Array]]:
        (tokens, chosen, share), gradient = part
        journey = _plan(chosen, weights, exchange)

        def go(turn: jax.Array, totals: Any) -> Any:
            of_rows, of_share, of_weights = totals
            rows, arrived = journey.there(turn, tokens, share)
            results = journey.send_tokens(rows, gradient)[arrived.order]
            _, pull = jax.vjp(
                partial(_apply, sizes=arrived.sizes), arrived.tokens, arrived.share, weights
            )
            to_rows, to_share, more = pull(results)
            return (
                of_rows.at[rows].set(journey.back(arrived, to_rows), mode="drop"),
                of_share.at[rows].set(journey.back(arrived, to_share), mode="drop"),
                jax.tree.map(lambda total, x: total + x.astype(total.dtype), of_weights, more),
            )

        of_rows = jnp.zeros((chosen.size, tokens.shape[1]), tokens.dtype)
        of_share = jnp.zeros((chosen.size,), share.dtype)
        of_rows, of_share, of_weights = journey.repeat(go, (of_rows, of_share, of_weights))
        of_tokens = jnp.sum(of_rows.reshape(*chosen.shape, -1), axis=1, dtype=jnp.float32)
        return of_weights, (of_tokens.astype(tokens.dtype), of_share.reshape(share.shape))

    parts = _split(tokens, chosen, share, weights, exchange)
    (gradients,) = _in_parts((gradient,), len(parts[0]), exchange)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    if len(parts[0]) > 1:
        of_weights, found = jax.lax.scan(chunk, zeros, (parts, gradients))
    else:
        of_weights, found = chunk(zeros, _first((parts, gradients)))
    of_tokens, of_share = (x.reshape(-1, x.shape[-1])[: len(tokens)] for x in found)
    of_weights = jax.tree.map(lambda x, w: x.astype(w.dtype), of_weights, weights)
    return of_tokens, None, of_share, of_weights


run_experts.defvjp(_forward, _backward)


class _Arrived(NamedTuple):
    """What came to this device in a turn, its experts' rows being neighbours, the empty ones last.

    order: [rows] from the order of arrival. sizes: int32 [experts], rows of each.
    """

    tokens: jax.Array
    share: jax.Array
    order: jax.Array
    sizes: jax.Array


@dataclass(frozen=True)
class _Journey:
    """Where each of a chunk's rows goes, a row being a token and one of the experts it chose.

    experts: int32 [rows], which. order: [rows], rows sorted by expert. starts, counts: [devices],
    of each device's rows among them. each: experts of a device. turns: how often all go.
    """

    experts: jax.Array
    order: jax.Array
    starts: jax.Array
    counts: jax.Array
    turns: jax.Array
    each: int
    per_token: int
    room: int
    exchange: Exchange

    def there(
        self, turn: jax.Array, tokens: jax.Array, share: jax.Array
    ) -> tuple[jax.Array, _Arrived]:
        """Which rows leave this device (beyond the last one: none), and which arrive."""
        places = turn * self.room + jnp.arange(self.room, dtype=jnp.int32)
        inside = (places < self.counts[:, None]).reshape(-1)
        places = jnp.minimum(self.starts[:, None] + places, len(self.order) - 1).reshape(-1)
        beyond = len(self.order) + jnp.arange(len(inside), dtype=jnp.int32)
        rows = jnp.where(inside, self.order[places], beyond)
        experts = jnp.where(inside, self.experts[self.order[places]] % self.each, self.each)
        experts = self.exchange.send(experts)
        order = jnp.argsort(experts, stable=True)
        sizes = jnp.bincount(experts, length=self.each).astype(jnp.int32)
        share = self.exchange.send(share.reshape(-1).at[rows].get(mode="fill", fill_value=0))
        return rows, _Arrived(self.send_tokens(rows, tokens)[order], share[order], order, sizes)

    def send_tokens(self, rows: jax.Array, tokens: jax.Array) -> jax.Array:
        """Something of the tokens [n, ...] to where the rows go."""
        leaving = tokens.at[rows // self.per_token].get(mode="fill", fill_value=0)
        return self.exchange.send(leaving)

    def back(self, arrived: _Arrived, results: jax.Array) -> jax.Array:
        """Results of the rows that arrived, to where they came from and in the order of leaving."""
        return self.exchange.send(results[jnp.argsort(arrived.order)])

    def repeat(self, go: Callable[[jax.Array, Any], Any], state: Any) -> Any:
        """`state = go(turn, state)` for all turns."""
        if self.room >= len(self.order):
            return go(jnp.int32(0), state)

        def advance(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            turn, state = carry
            return turn + 1, go(turn, state)

        # The planner reads there how often to count a loop that ends when the data says so.
        even = -(-len(self.order) // (self.room * self.exchange.devices))
        with jax.named_scope(f"turns_if_even_{even}"):
            return jax.lax.while_loop(
                lambda carry: carry[0] < self.turns, advance, (jnp.int32(0), state)
            )[1]


def _plan(chosen: jax.Array, weights: Params, exchange: Exchange) -> _Journey:
    experts, each = chosen.reshape(-1), len(weights["gate"])
    room = exchange.room_for(len(experts))
    counts = jnp.bincount(experts // each, length=exchange.devices).astype(jnp.int32)
    turns = -(-jnp.max(counts) // room)
    if exchange.everyone:
        turns = jax.lax.pmax(turns, exchange.everyone)
    return _Journey(
        experts=experts,
        order=jnp.argsort(experts, stable=True).astype(jnp.int32),
        starts=(jnp.cumsum(counts) - counts).astype(jnp.int32),
        counts=counts,
        turns=turns,
        each=each,
        per_token=chosen.shape[1],
        room=room,
        exchange=exchange,
    )


def _split(
    tokens: jax.Array, chosen: jax.Array, share: jax.Array, weights: Params, exchange: Exchange
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chunks of the tokens, leaves [chunks, chunk, ...]; what fills the last one goes nowhere."""
    count = -(-len(tokens) // exchange.chunk)
    tokens, share, chosen = _in_parts((tokens, share, chosen + 1), count, exchange)
    nowhere = exchange.devices * len(weights["gate"])
    return tokens, jnp.where(chosen == 0, nowhere, chosen - 1), share


def _in_parts(leaves: tuple[jax.Array, ...], count: int, exchange: Exchange) -> Any:
    if count == 1:
        return tuple(leaf[None] for leaf in leaves)
    padded = (jnp.pad(x, ((0, count * exchange.chunk - len(x)), (0, 0))) for x in leaves)
    return tuple(leaf.reshape(count, exchange.chunk, -1) for leaf in padded)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


# --- The experts' products -----------------------------------------------------------------------


def _apply(tokens: jax.Array, share: jax.Array, weights: Params, sizes: jax.Array) -> jax.Array:
    """share * expert(token), row by row; what follows the last expert's rows is undefined.

    Args:
      tokens: [rows, hidden], sorted by expert. share: float32 [rows].
      sizes: int32 [experts], rows of each.
    """
    gate = grouped_product(tokens, weights["gate"], sizes).astype(jnp.float32)
    up = grouped_product(tokens, weights["up"], sizes).astype(jnp.float32)
    # Weighed before the last product: its gradient then needs no result that travelled back.
    inner = jax.nn.silu(gate) * up * share[:, None]
    return grouped_product(inner.astype(tokens.dtype), weights["down"], sizes)
