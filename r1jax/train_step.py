"""The train step of all stages: state, optimizer, micro-batches, guard against non-finite updates.

A loss here is a weighted sum over rows, with weights that are computed once from the whole batch
(`objectives/normalisation.py`). So the losses and gradients of micro-batches add up to exactly
those of the batch. A stage supplies its weighted rows and its loss; `train_step` does the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import struct

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Num, PyTree

    from r1jax.settings.optimizer import OptimizerSection
    from r1jax.sharding import Layout

# The scope of the loop over micro-batches: the planner may be given its turns.
MICRO_BATCHES = "micro_batches"

Metrics = dict[str, jax.Array]
Batch = TypeVar("Batch")
Rows = TypeVar("Rows")
Result = TypeVar("Result")


# --- State ---------------------------------------------------------------------------------------


@struct.dataclass
class TrainState:
    """Weights, optimizer state and the number of batches so far."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


# (state, batch) -> the next state, and metrics: float32 scalars.
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_train_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The first train state of these weights, which become a part of it: no copy is made.

    A step that is jitted with `donate_argnums=0` consumes its state, so `params` cannot be used
    after the first step. Who keeps them, say for the reference of a KL penalty, copies them first:
    `reference = jax.tree.map(jnp.copy, params)`.

    Scalars (the step, the optimizer's counts) come to the mesh of the weights, where those are on
    one. An update leaves them there: if it first found them elsewhere, it would compile twice.
    """
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    meshes = {
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(params)
        if not isinstance(leaf, jax.core.Tracer)
        and isinstance(getattr(leaf, "sharding", None), jax.NamedSharding)
    }
    if len(meshes) != 1:
        return state
    replicated = jax.NamedSharding(meshes.pop(), jax.P())

    def to_mesh(leaf: jax.Array) -> jax.Array:
        return jax.device_put(leaf, replicated) if jnp.ndim(leaf) == 0 else leaf

    return TrainState(to_mesh(state.step), params, jax.tree.map(to_mesh, state.opt_state))


def abstract_train_state(
    params: PyTree, optimizer: optax.GradientTransformation, layout: Layout
) -> TrainState:
    """Shapes, dtypes and shardings of the train state: moments are split like their weights.

    Args:
      params: weights or `jax.ShapeDtypeStruct`s, with shardings.
    """
    shapes = jax.eval_shape(lambda p: init_train_state(p, optimizer), params)

    def like(leaf: jax.ShapeDtypeStruct, source: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=source.sharding)

    def replicated(leaf: jax.ShapeDtypeStruct) -> PyTree:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated)

    return TrainState(
        step=replicated(shapes.step),
        params=jax.tree.map(like, shapes.params, params),
        opt_state=optax.tree.map_params(
            optimizer, like, shapes.opt_state, params, transform_non_params=replicated
        ),
    )


def create_train_state(
    params: PyTree, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The first train state, every array created where it will stay (else the update compiles
    twice). Consumes `params`."""
    create = jax.jit(
        lambda p: init_train_state(p, optimizer),
        out_shardings=shardings_of(abstract),
        donate_argnums=0,
    )
    return create(params)


def shardings_of(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def jit_update(update: TrainStep[Batch], abstract: TrainState) -> jax.stages.Wrapped:
    """`update(state, batch) -> (state, metrics)`, compiled; it consumes the state it is given."""
    return jax.jit(update, donate_argnums=0, out_shardings=(shardings_of(abstract), None))


# --- Micro-batches -------------------------------------------------------------------------------


def _deal(rows: Rows, parts: int) -> Rows:
    """Leaves [N, ...] as [parts, N / parts, ...]: row n goes to part n % parts.

    Dealing in turn, not by neighbours, keeps the rows of every part spread over the mesh, where
    they are.

    Raises:
      ValueError: N is no multiple of `parts`, or differs between the leaves.
    """
    leaves = jax.tree.leaves_with_path(rows)
    ((count, _),) = Counter(leaf.shape[0] for _, leaf in leaves if leaf.ndim).most_common(1)
    for path, leaf in leaves:
        if leaf.shape[:1] != (count,):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} of a batch has shape {leaf.shape}; to be split into "
                f"{parts} micro-batches its first dimension must be the rows, {count} as elsewhere"
            )
    if count % parts:
        near = max(n for n in range(1, parts) if count % n == 0)
        raise ValueError(
            f"a batch of {count} rows does not split into {parts} micro-batches; give a divisor of "
            f"{count}, such as {near}"
        )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1), rows)


def map_micro_batches(
    function: Callable[[Rows], Result],
    rows: Rows,
    micro_batches: int,
    used: Int[Array, ""] | None = None,
) -> Result:
    """`function` of all rows, a micro-batch at a time, to bound activation memory.

    Args:
      function: leaves [n, ...] -> leaves [n, ...], each row for itself.
      rows: leaves [N, ...].
      used: run only the first micro-batches, this many; default: all.

    Returns:
      What `function` gives for all N rows, in their order; 0 for those of no used micro-batch.
    """
    if micro_batches == 1:
        return function(rows)
    if used is None:
        parts = jax.lax.map(function, _deal(rows, micro_batches))
        return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:]), parts)
    part = _picker(rows, micro_batches)

    def write(index: jax.Array, results: Result) -> Result:
        return jax.tree.map(
            lambda whole, x: jax.lax.dynamic_update_index_in_dim(whole, x, index, 1),
            results,
            function(part(index)),
        )

    shapes = jax.eval_shape(lambda: function(part(jnp.int32(0))))
    zeros = jax.tree.map(
        lambda x: jnp.zeros((x.shape[0], micro_batches, *x.shape[1:]), x.dtype), shapes
    )
    results = _repeat(write, zeros, micro_batches, used)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)


def accumulate_gradients(
    loss_fn: Callable[[PyTree, Rows], tuple[Float[Array, ""], Result]],
    params: PyTree,
    rows: Rows,
    micro_batches: int,
    used: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], PyTree, Result]:
    """Sum of losses and gradients over `micro_batches` equal parts of the rows.

    Exact when loss_fn is a weighted sum over rows, as all losses here are.

    Args:
      rows: leaves [N, ...]; row n goes to micro-batch n % micro_batches.
      used: run only the first micro-batches, this many; the others hold nothing. Default: all.

    Returns:
      Loss, gradients, and loss_fn's auxiliary values of each part, stacked [micro_batches, ...]; 0
      for those that are not used.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        (loss, aux), gradients = value_and_grad(params, rows)
        return loss, gradients, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], aux)

    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))

    def add(total: PyTree, part: Rows) -> tuple[PyTree, Result]:
        (loss, aux), gradients = value_and_grad(params, part)
        return jax.tree.map(jnp.add, total, (loss, gradients)), aux

    if used is None:
        (loss, gradients), aux = jax.lax.scan(add, zeros, _deal(rows, micro_batches))
        return loss, gradients, aux
    part = _picker(rows, micro_batches)

    def one_part(index: jax.Array, carry: tuple[PyTree, Result]) -> tuple[PyTree, Result]:
        total, stacked = carry
        total, aux = add(total, part(index))
        return total, jax.tree.map(lambda whole, x: whole.at[index].set(x), stacked, aux)

    _, shapes = jax.eval_shape(lambda: add(zeros, part(jnp.int32(0))))
    stacked = jax.tree.map(lambda x: jnp.zeros((micro_batches, *x.shape), x.dtype), shapes)
    (loss, gradients), aux = _repeat(one_part, (zeros, stacked), micro_batches, used)
    return loss, gradients, aux


def _picker(rows: Rows, parts: int) -> Callable[[jax.Array], Rows]:
    """index -> the rows of that micro-batch; those of `_deal`, and no others are moved."""
    dealt = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), _deal(rows, parts))

    def part(index: jax.Array) -> Rows:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 1, keepdims=False), dealt
        )

    return part


def _repeat(
    function: Callable[[jax.Array, Result], Result], start: Result, most: int, used: jax.Array
) -> Result:
    """`function(index, value)` for all indices below `used`."""

    def advance(carry: tuple[jax.Array, Result]) -> tuple[jax.Array, Result]:
        index, value = carry
        return index + 1, function(index, value)

    # The planner reads there how often to count a loop that ends when the data says so.
    with jax.named_scope(f"{MICRO_BATCHES}_turns_if_even_{most}"):
        return jax.lax.while_loop(
            lambda carry: carry[0] < used, advance, (jnp.zeros((), used.dtype), start)
        )[1]


# --- Update --------------------------------------------------------------------------------------


class AfterUpdate(Protocol):
    """What else is done to the weights, such as balancing experts."""

    def __call__(self, params: PyTree, counts: PyTree, /) -> tuple[PyTree, Metrics]:
        """(Weights after the optimizer, counts of the batch) -> weights, and metrics."""
        ...


def apply_if_finite(
    state: TrainState,
    loss: Float[Array, ""],
    gradients: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    counts: PyTree = None,
    after_update: AfterUpdate | None = None,
) -> tuple[TrainState, Metrics]:
    """The optimizer's update; a non-finite loss or gradient leaves weights and moments alone.

    The step counter advances either way: it counts batches.

    Args:
      counts: what `after_update` is given beside the weights.
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics: Metrics = {}
    if after_update is not None:
        params, metrics = after_update(params, counts)

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(finite, new, old)

    new_state = TrainState(
        state.step + 1,
        jax.tree.map(keep, params, state.params),
        jax.tree.map(keep, opt_state, state.opt_state),
    )
    return new_state, {
        "loss": loss,
        "optimizer/grad_norm": norm,
        "optimizer/finite": finite.astype(jnp.float32),
        **metrics,
    }


class LossOutput(NamedTuple):
    """What a loss function gives for one micro-batch; all but the loss is for metrics.

    loss: weighted sum over the rows, which is differentiated.
    sums: name -> scalar; the metric is the sum over micro-batches.
    means: name -> (total, count); the metric is the sum of totals / the sum of counts, and 0 where
        nothing was counted. It is exact, however the tokens spread over micro-batches.
    maxima: name -> scalar; the metric is the largest.
    counts: any pytree of arrays, summed over micro-batches for `AfterUpdate`.
    """

    loss: Float[Array, ""]
    sums: Mapping[str, Num[Array, ""]] = {}
    means: Mapping[str, tuple[Num[Array, ""], Num[Array, ""]]] = {}
    maxima: Mapping[str, Num[Array, ""]] = {}
    counts: PyTree = None


def train_step(
    state: TrainState,
    rows: Rows,
    loss_fn: Callable[[PyTree, Rows], LossOutput],
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    used: Int[Array, ""] | None = None,
    after_update: AfterUpdate | None = None,
) -> tuple[TrainState, Metrics]:
    """One update; pure, to be jitted with the state donated.

    Args:
      rows: a batch with the weights of its rows or tokens, leaves [N, ...].
      loss_fn: (params, micro-batch of those rows) -> loss and metrics.
      micro_batches: equal parts that the rows are split into, to bound activation memory.
      used: the number of micro-batches that hold anything, at least 1: the first ones. The others
        cost nothing. Default: all.
      after_update: what else is done to the weights, given `LossOutput.counts` of the whole batch.

    Returns:
      The next state, and metrics: `loss`, `optimizer/grad_norm`, `optimizer/finite`, those of
      `after_update`, and those of the loss function, which may replace `loss`.
    """

    def loss_and_rest(params: PyTree, rows: Rows) -> tuple[Float[Array, ""], PyTree]:
        output = loss_fn(params, rows)
        return output.loss, output[1:]

    loss, gradients, (sums, means, maxima, counts) = accumulate_gradients(
        loss_and_rest, state.params, rows, micro_batches, used
    )
    counts = jax.tree.map(lambda parts: parts.sum(axis=0), counts)
    ran = jnp.arange(micro_batches) < (micro_batches if used is None else used)
    state, metrics = apply_if_finite(
        state, loss, gradients, optimizer, counts=counts, after_update=after_update
    )
    return state, {
        **metrics,
        **{name: parts.sum() for name, parts in sums.items()},
        **{
            name: totals.sum() / jnp.maximum(parts.sum(), 1)
            for name, (totals, parts) in means.items()
        },
        **{name: jnp.where(ran, parts, parts[0]).max() for name, parts in maxima.items()},
    }


# --- Optimizer -----------------------------------------------------------------------------------


def make_schedule(section: OptimizerSection, steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then constant, cosine or linear to the floor."""
    peak, floor = section.learning_rate, section.learning_rate * section.final_fraction
    rest = max(steps - section.warmup_steps, 1)
    if section.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=section.final_fraction)
    elif section.schedule == "linear":
        main = optax.linear_schedule(peak, floor, rest)
    else:
        main = optax.constant_schedule(peak)
    if section.warmup_steps == 0:
        return main
    # Update n uses the rate at n: start above 0, or the first update would do nothing.
    warmup = optax.linear_schedule(peak / section.warmup_steps, peak, section.warmup_steps)
    return optax.join_schedules([warmup, main], [section.warmup_steps])


def make_optimizer(section: OptimizerSection, steps: int) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm.

    The biases that choose experts have no gradient, and so no update; nor do they decay.
    """
    return optax.chain(
        optax.clip_by_global_norm(section.max_grad_norm),
        optax.adamw(
            make_schedule(section, steps),
            b1=section.beta1,
            b2=section.beta2,
            eps=section.epsilon,
            weight_decay=section.weight_decay,
            mu_dtype=section.moment_dtype,
            mask=_decays,
        ),
    )


def _decays(params: PyTree) -> PyTree:
    def decays(path: tuple[jax.tree_util.KeyEntry, ...], _: jax.Array) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) != "router_bias"

    return jax.tree.map_with_path(decays, params)
