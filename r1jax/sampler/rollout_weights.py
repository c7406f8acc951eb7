"""From the weights that are trained to those that are sampled from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace

import jax
from jax.sharding import NamedSharding
from jax.stages import Wrapped

from r1jax.models.config import Decoder
from r1jax.models.parameters import Params, ParamSpec, abstract_weights, declare
from r1jax.sharding import Axes, Layout, make_rollout_layout, same_devices


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

    Compiled programs move them from device to device; nothing passes through the host. Where they
    lie right already it is the identity, and copies nothing.

    Args:
      policy: the model that is trained.
      sampler: the same model from `to_sample`; its layout arranges the same devices in the same
        order, or a group of others.
    """
    if reads_as_is(policy, sampler):
        return lambda params: params
    if same_devices(policy.layout, sampler.layout):
        return weights_mover(policy, sampler)
    sent, received = in_equal_parts(policy, sampler)
    send, receive = weights_mover(policy, sent), weights_mover(received, sampler)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_weights(received))
    return lambda params: receive(jax.tree.map(_copied_to, send(params), shardings))


def in_equal_parts(policy: Decoder, sampler: Decoder) -> tuple[Decoder, Decoder]:
    """The sampler's weights on the devices of the policy and on those of the sampler, cut into the
    same parts, so that a part is copied from one device to another.

    There are as many parts as both groups of devices, and the weights, divide into. Both groups are
    in the order of the processes, so that a process has the parts that its devices need.
    """
    groups = policy.layout, sampler.layout
    most = math.gcd(*(layout.mesh.size for layout in groups))
    for parts in (n for n in range(most, 0, -1) if most % n == 0):
        layouts = (
            make_rollout_layout(layout, {"fsdp": parts, "data": layout.mesh.size // parts})
            for layout in groups
        )
        sent, received = (to_sample(policy, layout) for layout in layouts)
        with contextlib.suppress(ValueError):  # of a dimension that they do not divide
            abstract_weights(sent)
            break
    return sent, received


def _copied_to(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same array on other devices, whose parts are those of this process's devices."""

    def key(index: tuple[slice, ...]) -> tuple[tuple[int, int, int], ...]:
        return tuple(each.indices(size) for each, size in zip(index, leaf.shape, strict=True))

    parts = {key(shard.index): shard.data for shard in leaf.addressable_shards}
    wanted = sharding.addressable_devices_indices_map(leaf.shape)
    copies = [jax.device_put(parts[key(index or ())], device) for device, index in wanted.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)


def weights_mover(policy: Decoder, sampler: Decoder) -> Wrapped:
    """The compiled program of `make_rollout_weights` on one group of devices."""
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
