"""Shapes and dtypes that an objective needs, checked as it is traced.

Of two arrays that do not fit, JAX broadcasts one where it can: [batch, 1] against [batch, time]
would train, silently, on wrong numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from jaxtyping import Array, Float

PER_ROW, PER_TOKEN = ("batch",), ("batch", "time")


def check_alike(axes: tuple[str, ...], arrays: Mapping[str, ArrayLike | None]) -> None:
    """Raises ValueError unless all arrays have these axes and one shape.

    Args:
      axes: `PER_ROW` or `PER_TOKEN`.
      arrays: by the names that a message shows; None is left out.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items() if array is not None}
    fitting = [name for name, shape in shapes.items() if len(shape) == len(axes)]
    # Whose shape is meant: not a column's, and what most have.
    common = Counter(shapes.values())
    model = max(fitting, key=lambda name: (shapes[name][-1] != 1, common[shapes[name]]), default="")
    expected = f" = {shapes[model]}, the shape of {model}" if model else ""
    for name, shape in shapes.items():
        if shape != shapes.get(model):
            raise ValueError(
                f"{name} has shape {shape}; expected [{', '.join(axes)}]{expected}: "
                + _remedy(axes, shape, shapes.get(model, ()))
            )


def _remedy(axes: tuple[str, ...], shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if axes == PER_ROW:
        column = len(shape) == 2 and shape[1] == 1
        return "drop its last axis, [:, 0]" if column else "give one value for each row"
    if len(shape) == 2 and expected == (shape[0], shape[1] + 1):
        return (
            "entry t is of token t, and the first token has no log-prob: put a 0 before it with "
            "jnp.pad(x, ((0, 0), (1, 0)))"
        )
    return "give one value for each token of each row, prompt and padding included"


def check_advantages(advantages: ArrayLike, name: str, tokens: ArrayLike) -> None:
    """Raises ValueError unless advantages are [batch] or [batch, time], as `tokens` has them.

    Args:
      tokens: an array [batch, time], of this name.
    """
    shape, expected = jnp.shape(advantages), jnp.shape(tokens)
    if shape not in (expected[:1], expected):
        column = shape == (*expected[:1], 1)
        raise ValueError(
            f"advantages has shape {shape}; expected [batch] = {expected[:1]}, or [batch, time] = "
            f"{expected} for packed rows, as {name} has shape {expected}"
            + (": drop its last axis, [:, 0]" if column else "")
        )


def per_token(
    advantages: Float[Array, " batch"] | Float[Array, "batch time"], name: str, tokens: ArrayLike
) -> Float[Array, "batch time_or_1"]:
    """Advantages that broadcast over the tokens of their rows and nothing else.

    Raises ValueError unless they are [batch] or [batch, time], as `tokens`, of this name, has them.
    """
    check_alike(PER_TOKEN, {name: tokens})
    check_advantages(advantages, name, tokens)
    return advantages[:, None] if jnp.ndim(advantages) == 1 else advantages


def check_log_probs(arrays: Mapping[str, ArrayLike | None]) -> None:
    """Raises ValueError unless all arrays are `PER_TOKEN`, alike, and of floating-point numbers."""
    check_alike(PER_TOKEN, arrays)
    check_floating(arrays)


def check_floating(arrays: Mapping[str, ArrayLike | None]) -> None:
    """Raises ValueError unless all arrays, by name, hold floating-point numbers or are None."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(jnp.result_type(array), jnp.floating):
            raise ValueError(
                f"{name} has dtype {jnp.result_type(array)}; expected floating-point numbers, such "
                "as float32"
            )
