"""Compiling a program for devices that need not be there, once for each different text."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.stages import Lowered

from r1jax.planner import hlo
from r1jax.planner.topologies import quiet


@dataclass(frozen=True)
class Binary:
    """A compiled program. Bytes are of one device; `outputs` the shardings of what it returns.

    module: None where its text cannot be had: a TPU compiler of another release may write what
        this jaxlib does not read.
    """

    module: hlo.Module | None
    outputs: Any
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int


class DoesNotFit(Exception):
    """The compiler gave up: the program alone needs more than a device has.

    needed, available: bytes of a device.
    """

    def __init__(self, needed: float, available: float) -> None:
        super().__init__(f"needs {needed:.3g} of {available:.3g} bytes")
        self.needed, self.available = needed, available


class NotPlanned(Exception):
    """A program that cannot be planned, because another one that it needs does not fit."""


class Compiler:
    """Compiles; programs of the same text, such as those of two like stages, only once."""

    def __init__(self) -> None:
        self._known: dict[str, Binary | DoesNotFit] = {}

    def __call__(self, lowered: Lowered) -> Binary:
        """Raises DoesNotFit."""
        key = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if key not in self._known:
            try:
                self._known[key] = _compile(lowered)
            except DoesNotFit as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, DoesNotFit):
            raise found
        return found


def _compile(lowered: Lowered) -> Binary:
    try:
        with quiet():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.search(
            r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(error)
        )
        if sizes is None:
            raise
        needed, available = (
            float(sizes[i]) * 2 ** (10 * " KMGT".index(sizes[i + 1] or " ")) for i in (1, 3)
        )
        raise DoesNotFit(needed, available) from error
    memory = compiled.memory_analysis()
    assert memory is not None  # of backends that compile for real
    try:
        with quiet():
            text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    return Binary(
        module=None if text is None else hlo.parse(text),
        outputs=compiled.output_shardings,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )
