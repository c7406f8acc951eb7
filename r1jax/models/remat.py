"""Rematerialisation: which activations of a layer the backward pass keeps or recomputes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import jax
from jax.extend.core import jaxprs_in_params

from r1jax.models.config import RematPolicy

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, Primitive

P = ParamSpec("P")
R = TypeVar("R")

# For `jax.ad_checkpoint.checkpoint_name`: what attention gives and its backward pass reads again,
# where it is no Pallas kernel, which is known without a name.
KEPT_OF_ATTENTION = "attention"


def remat(layer: Callable[P, R], policy: RematPolicy, *, scanned: bool) -> Callable[P, R]:
    """The same function under `jax.checkpoint`.

    Args:
      policy: `none` recomputes nothing; `dots` keeps what matrix products and kernels give, those
        of attention too; `full` keeps the inputs.
      scanned: the layer is the body of a loop. There the compiler cannot merge what is computed
        again with the first time, and needs no barriers, across which nothing is fused.
    """
    if policy == "none":
        return layer
    saved = _products if policy == "dots" else None
    return jax.checkpoint(layer, policy=saved, prevent_cse=not scanned)


def _products(primitive: Primitive, *inputs: object, **params: object) -> bool:
    """Whether `dots` keeps what a primitive gives."""
    policies = jax.checkpoint_policies
    saved = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(KEPT_OF_ATTENTION),
    )
    if primitive.name == "custom_vjp_call":  # of the function that kernel and gradient belong to
        return _has_kernel(jaxprs_in_params(params))
    return primitive.name == "pallas_call" or bool(saved(primitive, *inputs, **params))


def _has_kernel(jaxprs: Iterable[Jaxpr]) -> bool:
    return any(
        equation.primitive.name == "pallas_call" or _has_kernel(jaxprs_in_params(equation.params))
        for jaxpr in jaxprs
        for equation in jaxpr.eqns
    )
