"""Micro-batches, exact metrics, the finite guard, and the step that is built of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.sharding import single_device
from r1jax.train_step import (
    LossOutput,
    TrainState,
    abstract_train_state,
    accumulate_gradients,
    apply_if_finite,
    create_train_state,
    init_train_state,
    jit_update,
    map_micro_batches,
    train_step,
)

ROWS = 6


@pytest.fixture(params=[jax.jit, lambda function: function], ids=["jit", "eager"])
def compiled(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return request.param


def test_micro_batches_are_dealt_in_turn_and_come_back_in_order() -> None:
    rows = {"a": jnp.arange(6.0), "b": jnp.arange(12.0).reshape(6, 2)}

    def function(part: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return part["a"][:, None] + part["b"], jnp.broadcast_to(part["a"].sum(), part["a"].shape)

    sums, together = map_micro_batches(function, rows, 2)
    np.testing.assert_array_equal(sums, rows["a"][:, None] + rows["b"])
    # Rows 0, 2, 4 went together, and 1, 3, 5.
    np.testing.assert_array_equal(together, [6, 9, 6, 9, 6, 9])
    sums, together = map_micro_batches(function, rows, 1)
    np.testing.assert_array_equal(sums, rows["a"][:, None] + rows["b"])
    np.testing.assert_array_equal(together, [15] * 6)


def test_rows_that_cannot_be_dealt_are_refused() -> None:
    def split(rows: Any, parts: int) -> Any:
        return map_micro_batches(lambda part: part, rows, parts)

    rows = {"a": jnp.zeros(6), "b": jnp.zeros((6, 2))}
    for function in (split, jax.jit(split, static_argnums=1)):
        with pytest.raises(ValueError, match="6 rows does not split into 4 micro.*such as 3"):
            function(rows, 4)
        with pytest.raises(ValueError, match=r"\['b'\] of a batch has shape \(3, 2\).* rows, 6"):
            function(rows | {"b": jnp.zeros((3, 2)), "c": jnp.zeros(6)}, 2)
        with pytest.raises(ValueError, match=r"\['c'\] of a batch has shape \(\)"):
            function(rows | {"c": jnp.zeros(())}, 2)


# A linear model; every third row is left out of the mean.


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    rows = {"x": rng.normal(size=(ROWS, 3)), "y": rng.normal(size=ROWS), "mask": np.arange(6) % 3}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), rows) | {
        "mask": jnp.asarray([1, 1, 0, 1, 1, 0])
    }


def weigh(batch: dict[str, jax.Array], step: jax.Array) -> Any:
    weights = batch["mask"] / batch["mask"].sum() * (step + 1)
    return batch, weights.astype(jnp.float32)


def loss_fn(params: dict[str, jax.Array], rows: Any) -> LossOutput:
    part, weights = rows
    error = jnp.square(part["x"] @ params["w"] - part["y"])
    counted = error * part["mask"]
    return LossOutput(
        jnp.sum(error * weights),
        sums={"rows": part["mask"].sum()},
        means={"error": (counted.sum(), part["mask"].sum()), "nothing": (0 * counted.sum(), 0)},
        maxima={"worst": counted.max()},
        counts={"used": part["mask"].sum()[None]},
    )


def params() -> dict[str, jax.Array]:
    return {"w": jnp.asarray([0.5, -1.0, 2.0])}


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_a_step_is_that_of_the_whole_batch(
    compiled: Callable[[Any], Any], micro_batches: int
) -> None:
    """With 3 micro-batches one has no row that counts: a mean of means would be another."""
    rows, start = batch(), params()

    def whole(params: Any) -> jax.Array:
        error = jnp.square(rows["x"] @ params["w"] - rows["y"])
        return jnp.sum(error * rows["mask"]) / 4

    def after_update(params: Any, counts: Any) -> Any:
        return {"w": params["w"] + 100}, {"used": counts["used"][0].astype(jnp.float32)}

    optimizer = optax.sgd(1.0)

    def step(state: TrainState, batch: Any) -> Any:
        rows = weigh(batch, state.step)
        return train_step(
            state,
            rows,
            loss_fn,
            optimizer,
            micro_batches=micro_batches,
            after_update=after_update,
        )

    # At step 1 `weigh` weighs twice as much as at step 0.
    state = init_train_state(start, optimizer).replace(step=jnp.int32(1))
    state, metrics = compiled(step)(state, rows)
    loss, gradient = jax.value_and_grad(whole)(start)
    np.testing.assert_allclose(state.params["w"], start["w"] - 2 * gradient["w"] + 100, rtol=1e-5)
    assert state.step == 2
    error = np.square(rows["x"] @ start["w"] - rows["y"]) * rows["mask"]
    expected = {
        "loss": 2 * loss,
        "rows": 4,
        "error": loss,
        "nothing": 0,
        "worst": error.max(),
        "used": 4,
        "optimizer/finite": 1,
        "optimizer/grad_norm": 2 * jnp.linalg.norm(gradient["w"]),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_auxiliary_values_are_stacked_by_micro_batch() -> None:
    rows = weigh(batch(), jnp.int32(0))
    for micro_batches in (1, 3):
        _, _, sums = accumulate_gradients(
            lambda params, part: (loss_fn(params, part).loss, loss_fn(params, part).sums["rows"]),
            params(),
            rows,
            micro_batches,
        )
        assert sums.tolist() == {1: [4], 3: [2, 2, 0]}[micro_batches]


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_non_finite_update_changes_nothing_but_the_counter(
    compiled: Callable[[Any], Any], broken: str
) -> None:
    optimizer = optax.adam(0.1)
    state = init_train_state(params(), optimizer)
    loss = jnp.float32(jnp.nan if broken == "loss" else 1.0)
    gradients = {"w": jnp.asarray([1.0, jnp.inf if broken == "gradient" else 1.0, 1.0])}

    def update(state: TrainState, loss: jax.Array, gradients: Any) -> Any:
        def after_update(params: Any, counts: Any) -> Any:
            return jax.tree.map(lambda x: x + 1, params), {}

        return apply_if_finite(state, loss, gradients, optimizer, after_update=after_update)

    after, metrics = compiled(update)(state, loss, gradients)
    assert metrics["optimizer/finite"] == 0 and after.step == 1
    for new, old in zip(
        jax.tree.leaves((after.params, after.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)
    after, metrics = compiled(update)(state, jnp.float32(1.0), {"w": jnp.ones(3)})
    assert metrics["optimizer/finite"] == 1
    np.testing.assert_allclose(after.params["w"], params()["w"] - 0.1 + 1, rtol=1e-5)


def test_a_state_is_created_as_its_abstract_says_and_the_update_is_compiled_once() -> None:
    layout, optimizer = single_device(), optax.adam(0.1)
    start = jax.device_put(params(), layout.replicated)
    abstract = abstract_train_state(start, optimizer, layout)
    expected = init_train_state(params(), optimizer)
    state = create_train_state(start, optimizer, abstract)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for like, made, value in zip(*map(jax.tree.leaves, (abstract, state, expected)), strict=True):
        assert (like.shape, like.dtype, like.sharding) == (made.shape, made.dtype, made.sharding)
        np.testing.assert_array_equal(made, value)

    def step(state: TrainState, batch: Any) -> Any:
        return train_step(state, weigh(batch, state.step), loss_fn, optimizer)

    update = jit_update(step, abstract)
    for _ in range(2):
        before = state
        state, _ = update(state, batch())
    assert before.params["w"].is_deleted()  # donated
    assert update._cache_size() == 1


@pytest.mark.parametrize("on_mesh", [False, True])
def test_an_update_is_traced_once_from_an_initial_state(on_mesh: bool) -> None:
    params: Any = {"w": jnp.zeros((4, 2)), "scale": jnp.ones(())}
    if on_mesh:
        params = jax.device_put(params, single_device().replicated)
    traces = []

    def loss(params: Any, rows: Any) -> LossOutput:
        traces.append(rows)
        return LossOutput(jnp.sum((rows["x"] @ params["w"] * params["scale"] - 1) ** 2), {})

    optimizer = optax.adamw(optax.linear_schedule(1e-2, 1e-3, 3))
    update = jax.jit(lambda state, rows: train_step(state, rows, loss, optimizer), donate_argnums=0)
    state = init_train_state(params, optimizer)
    for _ in range(3):
        state, _ = update(state, {"x": jnp.ones((4, 4))})
    assert len(traces) == 1 and state.step == 3
