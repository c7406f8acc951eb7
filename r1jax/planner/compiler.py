"""Compiling a program for devices that need not be there, once for each different text."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.stages import Lowered

from r1jax.files import JsonObject, JsonValue
from r1jax.planner import hlo
from r1jax.planner.topologies import Slice, quiet
from r1jax.run.tpu_compiler import compiler_options

if TYPE_CHECKING:
    from jaxtyping import PyTree

_CALLS = 3
# Of what is kept of a program. Its key has no names of scopes, which a plan reads in what is kept:
# when they change, so must this.
_RECORD = 2


@dataclass(frozen=True)
class Binary:
    """A compiled program. Bytes are of one device.

    module: None where its text cannot be had, such as that of another release's TPU compiler.
    specs: how what it returns is laid out on its mesh, array by array.
    seconds: of processor time that compiling took.
    """

    module: hlo.Module | None
    specs: tuple[PartitionSpec, ...]
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int
    seconds: float


class DoesNotFit(Exception):
    """The compiler gave up: the program alone needs `needed` of `available` bytes of a device."""

    def __init__(self, needed: float, available: float) -> None:
        super().__init__(f"needs {needed:.3g} of {available:.3g} bytes")
        self.needed, self.available = needed, available


class Compiler:
    """Compiles for a slice; programs of the same text, such as those of two like stages, only once.

    Args:
      quick: with the least effort: a third of the time for a train step, a few percent slower.
      cache: a folder that keeps what was compiled for later processes. Its key is the program's
        text with all that the compiler's output depends on besides.
    """

    def __init__(self, target: Slice, *, quick: bool = False, cache: Path | None = None) -> None:
        self._options: JsonObject = dict(compiler_options(target.devices[0].device_kind))
        if quick:
            self._options["exec_time_optimization_effort"] = -1.0
        versions = [_RECORD, jax.__version__, _libtpu()]
        self._context = json.dumps([target.name, self._options, *versions])
        self._cache = cache
        self._known: dict[str, Binary | DoesNotFit] = {}

    def __call__(self, lowered: Lowered) -> Binary:
        """Raises DoesNotFit."""
        key = hashlib.sha256(f"{self._context}\n{lowered.as_text()}".encode()).hexdigest()
        if key not in self._known:
            self._known[key] = _understood(self._record(key, lowered))
        result = self._known[key]
        if isinstance(result, DoesNotFit):
            raise result
        return result

    def seconds(self, lowered: Lowered, prepare: Callable[[PyTree], PyTree]) -> float:
        """Median seconds of a call, on devices that are there.

        The arguments are reals as small as weights, zeros and truths, each where the program reads
        it; no program is faster for them. `prepare` changes the positional ones into those to use.
        """

        def fill(leaf: jax.stages.ArgInfo) -> jax.Array:
            value = 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype == jnp.bool_
            return jnp.full(leaf.shape, value, leaf.dtype)

        with quiet():
            compiled = lowered.compile(compiler_options=self._options)
        make = jax.jit(
            lambda: jax.tree.map(fill, compiled.args_info), out_shardings=compiled.input_shardings
        )
        taken = []
        for _ in range(1 + _CALLS):
            positional, named = make()  # new ones for each call, which may consume them
            positional = jax.block_until_ready(prepare(positional))
            began = time.perf_counter()
            jax.block_until_ready(compiled(*positional, **named))
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])  # the first one warms up

    def _record(self, key: str, lowered: Lowered) -> JsonObject:
        path = None if self._cache is None else self._cache / f"{key}.json.gz"
        if path is not None and path.is_file():
            return dict(json.loads(gzip.decompress(path.read_bytes())))
        record = _compile(lowered, self._options)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
            os.replace(partial, path)
        return record


def _libtpu() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("libtpu")
    return ""


def _compile(lowered: Lowered, options: JsonObject) -> JsonObject:
    """What `_understood` reads, as JSON."""
    began = time.process_time()
    try:
        with quiet():
            compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        sizes = re.search(
            r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(error)
        )
        if sizes is None:
            raise
        needed, available = (
            float(sizes[i]) * 2 ** (10 * " KMGT".index(sizes[i + 1] or " ")) for i in (1, 3)
        )
        return {"needed": needed, "available": available}
    seconds = time.process_time() - began
    memory = compiled.memory_analysis()
    assert memory is not None  # of backends that compile for real
    text = None
    with contextlib.suppress(jax.errors.JaxRuntimeError), quiet():
        text = compiled.as_text()
    return {
        "text": text,
        "specs": [_spec(each) for each in jax.tree.leaves(compiled.output_shardings)],
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


def _spec(sharding: Sharding) -> list[JsonValue]:
    if isinstance(sharding, SingleDeviceSharding):
        return []
    assert isinstance(sharding, NamedSharding), sharding  # arguments are laid out by a mesh
    return list(sharding.spec)


def _understood(record: JsonObject) -> Binary | DoesNotFit:
    if "needed" in record:
        return DoesNotFit(record["needed"], record["available"])
    rest = dict(record)
    text, specs = rest.pop("text"), rest.pop("specs")
    return Binary(
        module=None if text is None else hlo.parse(text),
        specs=tuple(
            PartitionSpec(*(tuple(axes) if isinstance(axes, list) else axes for axes in spec))
            for spec in specs
        ),
        **rest,
    )
