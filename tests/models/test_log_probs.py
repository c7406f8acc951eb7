"""Log-probs of the tokens that are wanted, beside those of all tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import jit

from r1jax.models.log_probs import TargetLogProbs, chunked_log_probs, wanted_log_probs

ROWS, TIME, WIDTH, VOCAB = 3, 10, 6, 11


def wanted_tokens(kind: str) -> np.ndarray:
    wanted = np.zeros((ROWS, TIME), bool)
    if kind == "some":
        wanted = np.random.default_rng(1).random((ROWS, TIME)) < 0.4
    elif kind == "one":
        wanted[2, 9] = True
    elif kind == "all":
        wanted[:] = True
    return wanted


@pytest.mark.parametrize("kind", ["none", "one", "some", "all"])
def test_wanted_log_probs_and_their_gradients_are_those_of_all_tokens(kind: str) -> None:
    rng = np.random.default_rng(0)
    hidden, matrix, weights = (
        rng.standard_normal(shape, np.float32)
        for shape in ((ROWS, TIME, WIDTH), (WIDTH, VOCAB), (ROWS, TIME))
    )
    targets = rng.integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)
    wanted = wanted_tokens(kind)
    junk = np.where(wanted[..., None], hidden, np.nan)  # what is not wanted is not read
    some = np.where(wanted, targets, -7)

    def value(hidden: Any, matrix: Any, targets: Any, chunk: int, all_tokens: bool) -> Any:
        options: Any = {"chunk": chunk, "temperature": 0.7}
        values = (
            chunked_log_probs(hidden, matrix, targets, **options)
            if all_tokens
            else wanted_log_probs(hidden, matrix, targets, wanted, **options)
        )
        terms = values.log_probs * weights + values.entropy
        return jnp.sum(jnp.where(wanted, terms, 0.0)), values

    both = jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), static_argnums=(3, 4))
    (loss, full), gradients = both(hidden, matrix, targets, TIME, True)
    for chunk in (1, 3, 64):
        (got, values), got_gradients = both(junk, matrix, some, chunk, False)
        assert isinstance(values, TargetLogProbs) and values.most_likely is None
        np.testing.assert_allclose(got, loss, rtol=1e-5)
        for name in ("log_probs", "entropy"):
            expected = np.where(wanted, getattr(full, name), 0.0)
            np.testing.assert_allclose(getattr(values, name), expected, atol=1e-6)
        for a, b in zip(got_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
