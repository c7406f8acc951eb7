"""From the weights that are trained to those that are sampled from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
from jax.stages import Wrapped

from r1jax.models.config import Decoder
from r1jax.models.parameters import Params, ParamSpec, abstract_weights, declare
from r1jax.sharding import Axes, Layout


def to_sample(policy: Decoder, layout: Layout) -> Decoder:
    """The same model over `layout`, its weights in the dtype that it computes in."""
    dtype = policy.execution.compute_dtype
    execution = replace(policy.execution, param_dtype=dtype)
    return replace(policy, layout=layout, execution=execution)


def reads_as_is(policy: Decoder, sampler: Decoder) -> bool:
    """Whether the sampler's weights are the policy's arrays."""
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and a.sharding == b.sharding,
        abstract_weights(policy),
        abstract_weights(sampler),
    )
    return all(jax.tree.leaves(same))


def make_rollout_weights(policy: Decoder, sampler: Decoder) -> Callable[[Params], Params]:
    """Build `weights(params)`: the policy's weights where and in the dtype the sampler reads them.

    One compiled program moves them from device to device; nothing passes through the host. Where
    they lie right already it is the identity, and copies nothing.

    Args:
      policy: the model that is trained.
      sampler: the same model from `to_sample`; its layout arranges the same devices in the same
        order.
    """
    if reads_as_is(policy, sampler):
        return lambda params: params
    return weights_mover(policy, sampler)


def weights_mover(policy: Decoder, sampler: Decoder) -> Wrapped:
    """The compiled program of `make_rollout_weights`."""
    dtype = sampler.execution.param_dtype
    specs = declare(sampler.config)
    wanted = abstract_weights(sampler)

    def move(leaf: jax.Array, spec: ParamSpec, axes: Axes) -> jax.Array:
        leaf = leaf.astype(spec.dtype(dtype))
        if policy.layout.mesh != sampler.layout.mesh:
            # By way of whole arrays, layer by layer: between two meshes the compiler knows no
            # better, and would do it with all layers at once, and in float32.
            leaf = jax.lax.optimization_barrier(leaf)
            leaf = policy.layout.constrain(leaf, (None,) * leaf.ndim)
        return sampler.layout.constrain(leaf, axes)

    def weights(params: Params) -> Params:
        def stack(name: str) -> Params:
            def one_layer(layer: Params) -> Params:
                moved: Params = {}
                for part, leaf in layer.items():
                    spec = specs[name][part]
                    if moved:
                        # One after the other: a layer's experts are 21 GiB of DeepSeek-V3.
                        leaf, moved = jax.lax.optimization_barrier((leaf, moved))
                    moved[part] = move(leaf, spec, spec.axes[1:])
                return moved

            moved: Params = jax.lax.map(one_layer, params[name])
            return moved

        return {
            name: stack(name)
            if isinstance(leaf, dict)
            else move(leaf, specs[name], specs[name].axes)
            for name, leaf in params.items()
        }

    return jax.jit(weights, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))
