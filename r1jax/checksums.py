"""Checksums of arrays that are the same on any mesh: what a checkpoint is compared with.

Each element is hashed with its index, and the hashes are added modulo 2^32, which is exact in any
order; so every device adds up its shard, and no array is gathered. A changed element always changes
the sum. Computed where the arrays are, before they are written and after they are read: a flipped
bit is found wherever it happened in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_SALTS = (0x9E3779B9, 0x7F4A7C15)


def checksums(arrays: Sequence[Array]) -> list[str]:
    """16 hexadecimal digits for each array, of any shape and number type.

    Those that are split over devices may be on several groups of these; all processes of a run make
    the call together.
    """
    if not arrays:
        return []
    shardings = [x.sharding if isinstance(x, jax.Array) else None for x in arrays]
    meshes = [each.mesh if isinstance(each, NamedSharding) else None for each in shardings]
    first = next((mesh for mesh in meshes if mesh is not None), None)
    meshes = [first if mesh is None else mesh for mesh in meshes]
    groups: dict[object, list[int]] = {}
    for i, mesh in enumerate(meshes):
        groups.setdefault(None if mesh is None else frozenset(mesh.devices.flat), []).append(i)
    results = [""] * len(arrays)
    for indices in groups.values():
        mesh = meshes[indices[0]]
        replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        # A program for each shape: weights, their moments and their reference share it.
        of_array = jax.jit(_checksum, out_shardings=replicated)
        for i in indices:
            # One at a time: several small all-reduces at once may wait for each other for ever on
            # CPU devices of several processes.
            results[i] = "".join(f"{part:08x}" for part in np.asarray(of_array(arrays[i])))
    return results


def _checksum(array: Array) -> UInt32[Array, " salt"]:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index, stride = index + along * jnp.uint32(stride % 2**32), stride * words.shape[axis]
    return jnp.stack([jnp.sum(_mixed(words ^ _mixed(index + jnp.uint32(salt)))) for salt in _SALTS])


def _mixed(words: Array) -> Array:
    """A one-to-one map of 32-bit numbers whose output bits all depend on all input bits.

    The constants are those of MurmurHash3's last step (github.com/aappleby/smhasher).
    """
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
