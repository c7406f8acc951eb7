"""Weights of tokens and rows by hand, for rows of one sequence and for packed ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.normalisation import mean_weights, row_weights, token_weights


def both(function: Any, **options: Any) -> list[Any]:
    function = functools.partial(function, **options)
    return [function, jax.jit(function)]


@pytest.mark.parametrize(
    ("normalisation", "length", "expected"),
    [
        ("sequence_mean", None, [[1 / 4, 1 / 4, 0], [1 / 2, 0, 0], [0, 0, 0]]),
        ("token_mean", None, [[1 / 3, 1 / 3, 0], [1 / 3, 0, 0], [0, 0, 0]]),
        ("constant", 5, [[0.1, 0.1, 0], [0.1, 0, 0], [0, 0, 0]]),
    ],
)
def test_token_weights_by_hand(normalisation: Any, length: int | None, expected: Any) -> None:
    mask = np.asarray([[1, 1, 0], [1, 0, 0], [0, 0, 0]])  # the last sample is masked out
    for weights in both(token_weights, normalisation=normalisation, constant_length=length):
        for dtype in (bool, np.int32, np.float32):
            out = weights(jnp.asarray(mask, dtype))
            assert out.dtype == jnp.float32
            np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("normalisation", "length", "expected"),
    [
        ("sequence_mean", None, [1 / 6, 1 / 6, 1 / 3, 0, 1 / 9, 1 / 9, 1 / 9]),
        ("token_mean", None, [1 / 6, 1 / 6, 1 / 6, 0, 1 / 6, 1 / 6, 1 / 6]),
        ("constant", 5, [1 / 15, 1 / 15, 1 / 15, 0, 1 / 15, 1 / 15, 1 / 15]),
    ],
)
def test_token_weights_of_packed_rows(
    normalisation: Any, length: int | None, expected: Any
) -> None:
    # One row of three sequences, of 2, 1 and 3 trained tokens.
    mask = jnp.asarray([[1, 1, 1, 0, 1, 1, 1]])
    lengths = jnp.asarray([[2, 2, 1, 0, 3, 3, 3]])
    for weights in both(token_weights, normalisation=normalisation, constant_length=length):
        out = weights(mask, lengths=lengths, sequences=3)
        np.testing.assert_allclose(out, [expected], rtol=1e-6)


def test_weights_of_a_batch_that_trains_nothing_are_zero() -> None:
    for normalisation, length in (("sequence_mean", None), ("token_mean", None), ("constant", 4)):
        out = token_weights(jnp.zeros((2, 3)), normalisation, constant_length=length)
        assert not out.any()
    assert row_weights(jnp.zeros(2)).tolist() == [0, 0]


def test_what_does_not_fit_is_refused() -> None:
    mask = jnp.ones((4, 6))
    for shape in ((4,), (4, 6, 1), ()):
        with pytest.raises(ValueError, match=r"mask has shape .*\[batch, time\]"):
            token_weights(jnp.ones(shape), "token_mean")
    for shape in ((4,), (4, 1), (6, 4)):
        with pytest.raises(ValueError, match=r"lengths has shape .*\(4, 6\), the shape of mask"):
            token_weights(mask, "sequence_mean", lengths=jnp.ones(shape), sequences=4)
    # Beside full rows, a column is the wrong one.
    with pytest.raises(ValueError, match=r"^mask has shape \(4, 1\).*\(4, 6\), the shape of leng"):
        token_weights(jnp.ones((4, 1)), "sequence_mean", lengths=mask, sequences=4)
    with pytest.raises(ValueError, match=r"sequences has shape \(4,\); expected a scalar"):
        token_weights(mask, "sequence_mean", lengths=mask, sequences=jnp.ones(4))
    with pytest.raises(ValueError, match="'constant' needs constant_length"):
        token_weights(mask, "constant")
    for function in both(row_weights):
        with pytest.raises(ValueError, match=r"mask has shape \(4, 1\); expected \[batch\]"):
            function(jnp.ones((4, 1)))


def test_half_of_what_packed_rows_need_is_refused_where_it_would_be_wrong() -> None:
    mask = jnp.ones((4, 6))
    for normalisation, length in (("sequence_mean", None), ("constant", 4)):
        with pytest.raises(ValueError, match="lengths without sequences"):
            token_weights(mask, normalisation, constant_length=length, lengths=mask)
    with pytest.raises(ValueError, match="sequences without lengths"):
        token_weights(mask, "sequence_mean", sequences=7)
    token_weights(mask, "constant", constant_length=4, sequences=7)
    token_weights(mask, "token_mean", lengths=mask)


def test_row_and_mean_weights_by_hand() -> None:
    for weights in both(row_weights):
        np.testing.assert_allclose(weights(jnp.asarray([1, 1, 0])), [0.5, 0.5, 0])
        np.testing.assert_allclose(weights(jnp.asarray([True, False])), [1, 0])
    for count in (4, jnp.int32(4)):
        np.testing.assert_allclose(mean_weights(3, count), [0.25] * 3)
        np.testing.assert_allclose(mean_weights(2, count, 0.5), [0.125] * 2)
    assert mean_weights(1, jnp.int32(0)).tolist() == [1]
