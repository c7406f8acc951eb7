"""Rematerialisation: which activations of a layer the backward pass keeps or recomputes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from r1jax.models.config import Decoder, ModelConfig, RematPolicy
from r1jax.models.parameters import abstract_weights

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr, Primitive

P = ParamSpec("P")
R = TypeVar("R")

# For `jax.ad_checkpoint.checkpoint_name`: what attention gives and its backward pass reads again,
# where it is no Pallas kernel, which is known without a name.
KEPT_OF_ATTENTION = "attention"


# `auto` counts on this share of a device's memory, and on so many copies of the weights in it: the
# reference's, two moments, the gradients' sum, and those of a micro-batch.
_OF_MEMORY = 0.9
_COPIES = 6


def remat_policy(model: Decoder, rows: int, time: int) -> RematPolicy:
    """What an update does whose micro-batches have so many rows of so many tokens.

    `auto` is `dots` where what that keeps fits a device's memory, by an estimate, beside weights,
    gradients, optimizer and a chunk of logits; else, or where that memory is not known, `full`.
    """
    config, execution, layout = model.config, model.execution, model.layout
    if execution.remat != "auto":
        return execution.remat
    if execution.device_memory is None:
        return "full"
    shards = layout.shards("batch") * layout.shards("time")
    tokens = -(-rows * time // shards)
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract_weights(model))
    )
    kept = tokens * kept_values(config, "dots") * jnp.dtype(execution.compute_dtype).itemsize
    rows = -(-rows // layout.shards("batch"))
    at_once = rows * execution.logit_steps(rows, time)
    logits = at_once * config.vocab_size * (4 + 2)  # and their gradient in the compute dtype
    fits = _COPIES * weights + kept + logits <= _OF_MEMORY * execution.device_memory
    return "dots" if fits else "full"


def kept_values(config: ModelConfig, policy: RematPolicy) -> int:
    """About how many activations of a token the backward pass keeps, of all layers together."""
    if policy == "full":
        return config.num_hidden_layers * config.hidden_size
    heads = config.num_attention_heads
    # A layer's input, the product after attention, and attention's output.
    per_layer = 2 * config.hidden_size + heads * config.v_head_dim
    if config.latent is None:
        per_layer += (heads + 2 * config.num_key_value_heads) * config.head_dim
    else:
        # Keys share their rotated part, which is in the latent's.
        per_layer += heads * (2 * config.head_dim - config.rope_dim + config.v_head_dim)
        per_layer += (config.latent.q_lora_rank or 0) + sum(w for _, w in config.cache_shapes)
    total = config.num_hidden_layers * per_layer
    for name, layers in config.stacks.items():
        width = config.intermediate_size
        if config.experts is not None and name == "layers":  # the routed ones are no such products
            width = config.experts.n_shared_experts * config.experts.moe_intermediate_size
        total += len(layers) * 2 * width
    if policy == "none":  # and what is made of them between two products, some of it in float32
        total += config.num_hidden_layers * (4 * config.intermediate_size + 10 * config.hidden_size)
    return total


def remat(layer: Callable[P, R], policy: RematPolicy, *, scanned: bool) -> Callable[P, R]:
    """The same function under `jax.checkpoint`.

    Args:
      policy: `none` recomputes nothing; `dots` keeps what matrix products and kernels give, those
        of attention too; `full` keeps the inputs.
      scanned: the layer is the body of a loop. There the compiler cannot merge what is computed
        again with the first time, and `dots` does without barriers, across which nothing is fused:
        a GPU copied all that was kept. With `full` they keep a TPU's memory down.
    """
    if policy == "none":
        return layer
    if policy == "full":
        return jax.checkpoint(layer)
    return jax.checkpoint(layer, policy=_products, prevent_cse=not scanned)


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
