"""The mixture of experts of DeepSeek-V2 and V3 (arXiv 2412.19437, section 2.1.2), dropless.

A token's experts and its result depend on nothing but the token: prefill, decoding and training
give the same, on one device or several.

Devices along the mesh axes of "expert" hold different experts. A token's activations are dispatched
to the devices of its experts, and the results combined, through buffers of a fixed size: a device
can send a number of rows to each other one, and where an expert is chosen more often, all devices
repeat the exchange. So nothing is dropped, shapes are static, and no device ever has to hold what
all others might send it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from r1jax.models.config import Decoder, MixtureOfExperts
from r1jax.models.grouped_product import grouped_product
from r1jax.models.parameters import Params
from r1jax.models.primitives import swiglu
from r1jax.sharding import Axes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

T = TypeVar("T")
Sums = tuple[jax.Array, ...]

_LEAST_BUFFER = 16  # rows that a device can send to each other one, at least


class Routing(NamedTuple):
    """What the router of a layer did; of several layers, with a dimension before the others.

    chosen: the experts of each token, best first; of the smallest integer type that holds them.
        `time` are samples where new tokens are decoded.
    load: how many tokens of the whole batch chose each expert.
    imbalance: `sequence_imbalance` of each row, with `balance`; else 0.
    """

    chosen: Int[Array, "*layers batch time k"]
    load: Float[Array, "*layers experts"]
    imbalance: Float[Array, "*layers batch"]


def mixture_of_experts(
    x: Float[Array, "batch time hidden"],
    w: Params,
    model: Decoder,
    *,
    axes: Axes,
    segment_ids: Int[Array, "batch time"] | None = None,
    replayed: Int[Array, "batch time k"] | None = None,
    balance: bool = False,
) -> tuple[Float[Array, "batch time hidden"], Routing]:
    """The routed experts' weighted sum plus the shared expert, and what the router did.

    Args:
      w: a layer's weights in the dtype of x, a `router_bias` in float32.
      axes: logical axes of the first two dimensions of x.
      segment_ids: 0 is padding, which would all go to the same experts, and goes to none. Default:
        there is none.
      replayed: experts that were chosen before, in place of a choice.
      balance: compute the imbalance of each segment.
    """
    experts, execution, layout = model.config.experts, model.execution, model.layout
    assert experts is not None
    split = layout.mesh.size > 1
    table = {name: mesh_axes if split else () for name, mesh_axes in layout.rules}
    token_axes = tuple(axis for name in axes if name is not None for axis in table[name])
    exchange = Exchange(
        layout.shards("expert"),
        execution.expert_chunk,
        table["expert"],
        tuple(layout.mesh.axis_names) if split else (),
    )
    segments = x.shape[1] + 1

    def local(inputs: dict[str, jax.Array], router: Params, weights: Params) -> Any:
        x, ids = inputs["x"], inputs["segment_ids"]
        tokens, replayed = x.reshape(-1, x.shape[-1]), inputs.get("replayed")
        if replayed is not None:
            replayed = replayed.reshape(len(tokens), -1).astype(jnp.int32)
        routes = route(tokens, router["router"], router.get("router_bias"), experts, replayed)
        # Gathered here, so that their gradients are scattered, rather than summed on every device.
        weights = {
            name: _gather(leaf, table["expert_embed"], _HIDDEN_DIMENSION[name])
            for name, leaf in weights.items()
        }
        chosen = jnp.where(ids.reshape(-1, 1) != 0, routes.chosen, experts.n_routed_experts)
        output = run_experts(tokens, chosen, routes.weights, weights, exchange)
        output = _sum_over(output, table["mlp"]).reshape(x.shape)
        load = jnp.bincount(chosen.reshape(-1), length=experts.n_routed_experts)
        imbalance = jnp.zeros(len(x), jnp.float32)
        if balance:
            imbalance = sequence_imbalance(
                routes.scores.reshape(*ids.shape, -1),
                ids,
                experts.num_experts_per_tok,
                segments=segments,
                sum_over_devices=lambda parts: _sum_over(parts, table[str(axes[1])]),
            )
        return output, Routing(
            routes.chosen.astype(experts.index_dtype).reshape(*ids.shape, -1),
            _sum_over(load.astype(jnp.float32), token_axes),
            imbalance,
        )

    inputs = {
        "x": x,
        "segment_ids": jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids,
        **({} if replayed is None else {"replayed": replayed}),
    }
    router: Params = {name: w[name] for name in ("router", "router_bias") if name in w}
    weights = {name: w[name] for name in _HIDDEN_DIMENSION}
    if split:
        rows = layout.spec(axes)
        weight_specs = {
            "gate": layout.spec(("expert", "expert_embed", "mlp")),
            "up": layout.spec(("expert", "expert_embed", "mlp")),
            "down": layout.spec(("expert", "mlp", "expert_embed")),
        }
        routing_specs: tuple[Any, ...] = (rows, PartitionSpec(), layout.spec(axes[:1]))
        local = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(rows, PartitionSpec(), weight_specs),
            out_specs=(rows, Routing(*routing_specs)),
            check_vma=False,
        )
    output, routing = local(inputs, router, weights)
    shared = swiglu(x, w["shared_gate"], w["shared_up"], w["shared_down"], layout)
    return output + shared, routing


def _sum_over(parts: T, axes: tuple[str, ...]) -> T:
    return jax.lax.psum(parts, axes) if axes else parts


_HIDDEN_DIMENSION = {"gate": 1, "up": 1, "down": 2}  # of the experts' weights


def _gather(weight: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    return jax.lax.all_gather(weight, axes, axis=dimension, tiled=True) if axes else weight


class _Routes(NamedTuple):
    """chosen: the experts of each token, best first. weights: theirs. scores: of all experts."""

    chosen: Int[Array, "n k"]
    weights: Float[Array, "n k"]
    scores: Float[Array, "n experts"]


def route(
    tokens: Float[Array, "n hidden"],
    router: Float[Array, "hidden experts"],
    bias: Float[Array, " experts"] | None,
    experts: MixtureOfExperts,
    chosen: Int[Array, "n k"] | None = None,
) -> _Routes:
    """The experts of each token, and their weights; in float32.

    The bias (auxiliary-loss-free load balancing, arXiv 2408.15664) decides the choice and has no
    part in the weights, so no gradient reaches it.

    Experts of the groups that a token leaves out are masked with -inf, as in DeepSeek's inference
    code and in transformers since 5; earlier transformers masked them with 0, and so chose one of
    them over an expert whose score and bias are negative together. The two differ only then.

    Args:
      bias: in float32, where `experts.biased`.
      chosen: the choice, where it was made before: only weights are then computed, from the present
        scores.
    """
    score = jax.nn.sigmoid if experts.scoring_func == "sigmoid" else jax.nn.softmax
    scores = score(tokens.astype(jnp.float32) @ router.astype(jnp.float32))
    if chosen is None:
        chosen = _choose(jax.lax.stop_gradient(scores if bias is None else scores + bias), experts)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return _Routes(chosen, weights * experts.routed_scaling_factor, scores)


def _choose(ranking: jax.Array, experts: MixtureOfExperts) -> jax.Array:
    """The best experts of the best groups, int32 [n, k]; ranking [n, experts]."""
    if experts.topk_group < experts.n_group:
        groups = ranking.reshape(len(ranking), experts.n_group, -1)
        group_scores = jnp.sum(jax.lax.top_k(groups, experts.group_score_experts)[0], axis=-1)
        kept = jax.lax.top_k(group_scores, experts.topk_group)[1]
        inside = jnp.any(kept[:, :, None] == jnp.arange(experts.n_group), axis=1)
        ranking = jnp.where(inside[:, :, None], groups, -jnp.inf).reshape(ranking.shape)
    return jax.lax.top_k(ranking, experts.num_experts_per_tok)[1]


def sequence_imbalance(
    scores: Float[Array, "rows time experts"],
    segment_ids: Int[Array, "rows time"],
    chosen: int,
    *,
    segments: int,
    sum_over_devices: Callable[[Sums], Sums] = lambda sums: sums,
) -> Float[Array, " rows"]:
    """Equations 17 to 20 without alpha, summed over the sequences of each row.

    Of a sequence of T tokens it is sum_i f_i P_i over the E experts: f_i is E / (K T) times the
    number of tokens whose K best scores i is among, and P_i the mean of its share of the scores.
    1 where all are even, up to E / K where all tokens choose the same. As in the equations, the
    best scores count, whatever bias or group decides on the choice. Padding is left out.

    Args:
      scores: what the router gives.
      segment_ids: below `segments`; 0 is padding.
      chosen: K, experts of a token.
      sum_over_devices: over those that a row is split over.
    """
    experts = scores.shape[-1]
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), chosen)[1]
    counted = jnp.sum(jax.nn.one_hot(best, experts), axis=-2)
    shares = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)

    def sums(row: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(row, ids, segments)

    count, share, length = sum_over_devices(
        (
            jax.vmap(sums)(counted, segment_ids),
            jax.vmap(sums)(shares, segment_ids),
            jax.vmap(sums)(jnp.ones_like(segment_ids, jnp.float32), segment_ids),
        )
    )
    each = jnp.sum(count * share, axis=-1) * experts / (chosen * jnp.maximum(length, 1) ** 2)
    return jnp.sum(each[:, 1:], axis=-1)


# --- Dispatch to the experts, and combination of their results -----------------------------------


@dataclass(frozen=True)
class Exchange:
    """Between which devices tokens are dispatched to their experts.

    devices: how many hold different experts, in equal parts, in the order of their index.
    chunk: tokens that a device dispatches at once, at most.
    axes: mesh axes that the devices are on.
    all_axes: of the mesh; along the others, devices only repeat the exchange equally often.
    buffer: rows that a device can send to each other one at once; default: see `buffer_rows`.
    """

    devices: int
    chunk: int
    axes: tuple[str, ...] = ()
    all_axes: tuple[str, ...] = ()
    buffer: int | None = None

    def buffer_rows(self, rows: int) -> int:
        """Half of the rows that one device sends another if experts are used evenly, or a few.

        The exchange is repeated as often as the busiest pair needs: small buffers are sent with
        little padding.
        """
        if self.buffer is not None or self.devices == 1:
            return self.buffer or rows
        return min(rows, max(_LEAST_BUFFER, -(-rows // (2 * self.devices))))

    def send(self, rows: jax.Array) -> jax.Array:
        """Rows [devices * buffer, ...] to the devices, in their order; gives what they sent."""
        return rows if self.devices == 1 else jax.lax.all_to_all(rows, self.axes, 0, 0, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def run_experts(
    tokens: Float[Array, "n hidden"],
    chosen: Int[Array, "n k"],
    token_weights: Float[Array, "n k"],
    weights: Params,
    exchange: Exchange,
) -> Float[Array, "n hidden"]:
    """The weighted sum of each token's experts.

    In the backward pass the tokens are dispatched again, so that only the arguments are kept.

    Args:
      tokens: this device's.
      chosen: of all devices' experts, best first; an expert that does not exist: none.
      token_weights: float32, of each chosen expert.
      weights: `gate` and `up` [experts of this device, hidden, inner], `down` [..., inner, hidden].
    """

    def chunk(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tokens, chosen, token_weights = part
        dispatch = _plan(chosen, weights, exchange)

        def one_round(index: jax.Array, results: jax.Array) -> jax.Array:
            rows, received = dispatch.send(index, tokens, token_weights)
            outputs = _apply(received.tokens, received.token_weights, weights, received.sizes)
            return results.at[rows].set(dispatch.send_back(received, outputs), mode="drop")

        results = jnp.zeros((chosen.size, tokens.shape[1]), tokens.dtype)
        results = dispatch.repeat(one_round, results).reshape(*chosen.shape, -1)
        # A token's sum begins with its best expert, in whatever round each result was computed.
        return jnp.sum(results, axis=1, dtype=jnp.float32).astype(tokens.dtype)

    parts = _split(tokens, chosen, token_weights, weights, exchange)
    sums = jax.lax.map(chunk, parts) if len(parts[0]) > 1 else chunk(_first(parts))
    return sums.reshape(-1, tokens.shape[1])[: len(tokens)]


def _forward(
    tokens: jax.Array,
    chosen: jax.Array,
    token_weights: jax.Array,
    weights: Params,
    exchange: Exchange,
) -> tuple[jax.Array, Any]:
    residuals = (tokens, chosen, token_weights, weights)
    return run_experts(*residuals, exchange), residuals


def _backward(exchange: Exchange, residuals: Any, gradient: jax.Array) -> Any:
    tokens, chosen, token_weights, weights = residuals

    def chunk(d_weights: Params, part: Any) -> tuple[Params, tuple[jax.Array, jax.Array]]:
        (tokens, chosen, token_weights), gradient = part
        dispatch = _plan(chosen, weights, exchange)

        def one_round(index: jax.Array, totals: Any) -> Any:
            d_rows, d_row_weights, d_weights = totals
            rows, received = dispatch.send(index, tokens, token_weights)
            d_outputs = dispatch.send_tokens(rows, gradient)[received.order]
            _, pull_back = jax.vjp(
                partial(_apply, sizes=received.sizes),
                received.tokens,
                received.token_weights,
                weights,
            )
            d_received, d_received_weights, d_more_weights = pull_back(d_outputs)
            return (
                d_rows.at[rows].set(dispatch.send_back(received, d_received), mode="drop"),
                d_row_weights.at[rows].set(
                    dispatch.send_back(received, d_received_weights), mode="drop"
                ),
                jax.tree.map(
                    lambda total, x: total + x.astype(total.dtype), d_weights, d_more_weights
                ),
            )

        d_rows = jnp.zeros((chosen.size, tokens.shape[1]), tokens.dtype)
        d_row_weights = jnp.zeros((chosen.size,), token_weights.dtype)
        totals = dispatch.repeat(one_round, (d_rows, d_row_weights, d_weights))
        d_rows, d_row_weights, d_weights = totals
        d_tokens = jnp.sum(d_rows.reshape(*chosen.shape, -1), axis=1, dtype=jnp.float32)
        return d_weights, (d_tokens.astype(tokens.dtype), d_row_weights.reshape(chosen.shape))

    parts = _split(tokens, chosen, token_weights, weights, exchange)
    (gradients,) = _in_chunks((gradient,), len(parts[0]), exchange)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    if len(parts[0]) > 1:
        d_weights, d_inputs = jax.lax.scan(chunk, zeros, (parts, gradients))
    else:
        d_weights, d_inputs = chunk(zeros, _first((parts, gradients)))
    d_tokens, d_token_weights = (x.reshape(-1, x.shape[-1])[: len(tokens)] for x in d_inputs)
    d_weights = jax.tree.map(lambda x, w: x.astype(w.dtype), d_weights, weights)
    return d_tokens, None, d_token_weights, d_weights


run_experts.defvjp(_forward, _backward)


class _Received(NamedTuple):
    """What a device received in a round, sorted by expert, padding last.

    order: [rows] from the order of arrival. sizes: int32 [experts], rows of each.
    """

    tokens: jax.Array
    token_weights: jax.Array
    order: jax.Array
    sizes: jax.Array


@dataclass(frozen=True)
class _Dispatch:
    """Where each of a chunk's rows goes, a row being a token and one of its experts.

    experts: int32 [rows], the row's. order: [rows], rows sorted by expert. starts, counts:
    [devices], of each device's rows in that order. rounds: how often the exchange is repeated.
    local_experts: experts of a device. buffer: rows to each device in a round.
    """

    experts: jax.Array
    order: jax.Array
    starts: jax.Array
    counts: jax.Array
    rounds: jax.Array
    local_experts: int
    per_token: int
    buffer: int
    exchange: Exchange

    def send(
        self, index: jax.Array, tokens: jax.Array, token_weights: jax.Array
    ) -> tuple[jax.Array, _Received]:
        """Send the rows of a round.

        Returns:
          Which rows those are (beyond the last one: padding), and what this device received.
        """
        places = index * self.buffer + jnp.arange(self.buffer, dtype=jnp.int32)
        inside = (places < self.counts[:, None]).reshape(-1)
        places = jnp.minimum(self.starts[:, None] + places, len(self.order) - 1).reshape(-1)
        beyond = len(self.order) + jnp.arange(len(inside), dtype=jnp.int32)
        rows = jnp.where(inside, self.order[places], beyond)
        local = self.local_experts
        experts = jnp.where(inside, self.experts[self.order[places]] % local, local)
        experts = self.exchange.send(experts)
        order = jnp.argsort(experts, stable=True)
        sizes = jnp.bincount(experts, length=local).astype(jnp.int32)
        flat = token_weights.reshape(-1)
        weights = self.exchange.send(flat.at[rows].get(mode="fill", fill_value=0))
        received = self.send_tokens(rows, tokens)
        return rows, _Received(received[order], weights[order], order, sizes)

    def send_tokens(self, rows: jax.Array, tokens: jax.Array) -> jax.Array:
        """Values of the tokens [n, ...] to the devices of these rows' experts."""
        sent = tokens.at[rows // self.per_token].get(mode="fill", fill_value=0)
        return self.exchange.send(sent)

    def send_back(self, received: _Received, results: jax.Array) -> jax.Array:
        """Results of the received rows, to the devices and in the order that they came from."""
        return self.exchange.send(results[jnp.argsort(received.order)])

    def repeat(self, one_round: Callable[[jax.Array, T], T], state: T) -> T:
        """`state = one_round(index, state)` for all rounds."""
        if self.buffer >= len(self.order):
            return one_round(jnp.int32(0), state)

        def advance(carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
            index, state = carry
            return index + 1, one_round(index, state)

        # The planner reads there how often to count a loop that ends when the data says so.
        even = -(-len(self.order) // (self.buffer * self.exchange.devices))
        with jax.named_scope(f"turns_if_even_{even}"):
            return jax.lax.while_loop(
                lambda carry: carry[0] < self.rounds, advance, (jnp.int32(0), state)
            )[1]


def _plan(chosen: jax.Array, weights: Params, exchange: Exchange) -> _Dispatch:
    experts, local_experts = chosen.reshape(-1), len(weights["gate"])
    buffer = exchange.buffer_rows(len(experts))
    counts = jnp.bincount(experts // local_experts, length=exchange.devices).astype(jnp.int32)
    rounds = -(-jnp.max(counts) // buffer)
    if exchange.all_axes:
        rounds = jax.lax.pmax(rounds, exchange.all_axes)
    return _Dispatch(
        experts=experts,
        order=jnp.argsort(experts, stable=True).astype(jnp.int32),
        starts=(jnp.cumsum(counts) - counts).astype(jnp.int32),
        counts=counts,
        rounds=rounds,
        local_experts=local_experts,
        per_token=chosen.shape[1],
        buffer=buffer,
        exchange=exchange,
    )


def _split(
    tokens: jax.Array,
    chosen: jax.Array,
    token_weights: jax.Array,
    weights: Params,
    exchange: Exchange,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chunks of the tokens, leaves [chunks, chunk, ...]; padding of the last one has no expert."""
    count = -(-len(tokens) // exchange.chunk)
    tokens, token_weights, chosen = _in_chunks((tokens, token_weights, chosen + 1), count, exchange)
    no_expert = exchange.devices * len(weights["gate"])
    return tokens, jnp.where(chosen == 0, no_expert, chosen - 1), token_weights


def _in_chunks(leaves: tuple[jax.Array, ...], count: int, exchange: Exchange) -> Any:
    if count == 1:
        return tuple(leaf[None] for leaf in leaves)
    padded = (jnp.pad(x, ((0, count * exchange.chunk - len(x)), (0, 0))) for x in leaves)
    return tuple(leaf.reshape(count, exchange.chunk, -1) for leaf in padded)


def _first(tree: T) -> T:
    first: T = jax.tree.map(lambda leaf: leaf[0], tree)
    return first


# --- The experts' products -----------------------------------------------------------------------


def _apply(
    tokens: jax.Array, token_weights: jax.Array, weights: Params, sizes: jax.Array
) -> jax.Array:
    """weight * expert(token), row by row; what follows the last expert's rows is undefined.

    Args:
      tokens: [rows, hidden], sorted by expert. token_weights: float32 [rows].
      sizes: int32 [experts], rows of each.
    """
    gate = grouped_product(tokens, weights["gate"], sizes).astype(jnp.float32)
    up = grouped_product(tokens, weights["up"], sizes).astype(jnp.float32)
    # Weighted before the last product: its gradient then needs no result that was sent back.
    inner = jax.nn.silu(gate) * up * token_weights[:, None]
    return grouped_product(inner.astype(tokens.dtype), weights["down"], sizes)
