"""Several processes, one program: which rows each has, and what all of them agree on.

Plain multi-controller JAX (`jax.distributed`): every process runs the same loop, holds its slice of
each batch, and takes part in every collective, in the same order. What decides a shape or a branch
must therefore be agreed on first. With one process all of this is free.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import jax
import numpy as np
from jax._src import distributed  # JAX has no public way to its key-value store
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from r1jax.sharding import Layout, batch_slices, process_batch_parts

T = TypeVar("T")  # a JSON value


def join_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run, if the environment says that there are several.

    Call it before anything that touches a device; without such a sign, or when `jax.distributed`
    is initialised already, it does nothing. The signs are

    - `JAX_COORDINATOR_ADDRESS`, with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`: spelled out. Without
      the last two, JAX asks the cluster for them.
    - `TPU_WORKER_HOSTNAMES` or `TPU_PROCESS_ADDRESSES` with several names, or
      `MEGASCALE_NUM_SLICES` above 1: GKE sets them in the pods of a TPU job.
    - `R1JAX_MULTI_HOST=1`: JAX detects the cluster, on Cloud TPU VMs (whose environment has no
      other sign; tpu_scripts/ sets it) and under Slurm or MPI. One host alone is fine, too.

    Returns once all processes have joined, which may take five minutes. Raises ValueError for a
    variable that is not a number in range, or where JAX knows of no other processes.
    """
    if jax.distributed.is_initialized() or not (sign := _sign_of_others(environment)):
        return
    count = _number(environment, "JAX_NUM_PROCESSES", least=1)
    index = _number(environment, "JAX_PROCESS_ID", least=0)
    if count is not None and index is not None and index >= count:
        raise ValueError(
            f"JAX_PROCESS_ID = {index}: with JAX_NUM_PROCESSES = {count} it is one of 0 to "
            f"{count - 1}"
        )
    # SIGTERM is handled here: JAX's handler would take it for a preemption that nobody polls.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            environment.get("JAX_COORDINATOR_ADDRESS"), num_processes=count, process_id=index
        )
    except ValueError as error:
        raise ValueError(
            f"{sign} = {environment[sign]} says that this run has several processes, but JAX "
            f"does not find them ({error}). Unset it for a run on this machine alone, or set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _sign_of_others(environment: Mapping[str, str]) -> str | None:
    """The variable that says that there are other processes."""
    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in environment.get(name, ""):
            return name
    if (_number(environment, "MEGASCALE_NUM_SLICES", least=1) or 1) > 1:
        return "MEGASCALE_NUM_SLICES"
    return "R1JAX_MULTI_HOST" if environment.get("R1JAX_MULTI_HOST") == "1" else None


def _number(environment: Mapping[str, str], name: str, least: int) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ValueError(f"{name} = {text}: it has to be a whole number from {least} on")
    return int(text)


class _KeyValueStore(Protocol):
    """What is used of JAX's `DistributedRuntimeClient`; it needs no device."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...
    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...
    def key_value_delete(self, key: str) -> None: ...


@dataclass(frozen=True)
class DistributedProcess:
    """This process among those of the run, and the store of process 0, at `address` (HOST:PORT)."""

    index: int
    count: int
    address: str
    store: _KeyValueStore


def distributed_process() -> DistributedProcess | None:
    """This process; None without `jax.distributed`, and where there are no others."""
    state = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return None
    return DistributedProcess(
        state.process_id, state.num_processes, str(state.coordinator_address), state.client
    )


class DisagreementError(ValueError):
    """The processes of a run were started differently; the message names which, and in what."""


_rounds = itertools.count()


def agree(facts: Mapping[str, object], remedy: str) -> None:
    """Returns if all processes have the same facts (JSON); all have to call it. Touches no device.

    Raises DisagreementError in every process: what differs, its values and which processes have
    them; then `remedy`, a sentence.
    """
    me = distributed_process()
    if me is None:
        return
    # Milliseconds; longer than peers.py waits, which says which process is missing.
    keys, wait = f"r1jax/agree/{next(_rounds)}", 600_000
    message = {"host": socket.gethostname(), "facts": facts}
    me.store.key_value_set(f"{keys}/{me.index}", json.dumps(message))
    if me.index == 0:
        texts = (me.store.blocking_key_value_get(f"{keys}/{i}", wait) for i in range(me.count))
        messages = [json.loads(text) for text in texts]
        lines = differences([m["facts"] for m in messages], [m["host"] for m in messages])
        me.store.key_value_set(f"{keys}/differences", json.dumps(lines))
    lines = json.loads(me.store.blocking_key_value_get(f"{keys}/differences", 2 * wait))
    if lines:
        rest = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
        listed = "\n  ".join([*lines[:8], *rest])
        raise DisagreementError(f"the processes of this run do not agree:\n  {listed}\n{remedy}")


def differences(facts: Sequence[Mapping[str, object]], hosts: Sequence[str]) -> list[str]:
    """Facts that are not the same in all processes: `key.path: value in process 1 (host); ...`.

    The rarest value comes first.
    """
    leaves = [dict(_leaves(each)) for each in facts]
    lines = []
    for path in dict.fromkeys(path for each in leaves for path in each):
        holders: dict[str, list[int]] = {}
        for index, each in enumerate(leaves):
            holders.setdefault(each.get(path, "nothing"), []).append(index)
        if len(holders) > 1:
            values = sorted(holders.items(), key=lambda item: len(item[1]))
            listed = "; ".join(f"{value} in {_named(those, hosts)}" for value, those in values)
            lines.append(f"{path}: {listed}")
    return lines


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, str]]:
    """The values of a JSON tree by `key.path`, as JSON; empty mappings and lists are values."""
    if not tree or not isinstance(tree, Mapping | list):
        yield path, json.dumps(tree)
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _named(processes: Sequence[int], hosts: Sequence[str]) -> str:
    """`processes 0 (host-a), 1 (host-b) and 62 more`."""
    shown = ", ".join(f"{index} ({hosts[index]})" for index in processes[:4])
    rest = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return f"process{'es' if len(processes) > 1 else ''} {shown}{rest}"


@dataclass(frozen=True)
class BatchSlice:
    """This process's slice of every batch: the `index`-th of `count` equal ones."""

    index: int
    count: int


def process_batch_slice(layout: Layout) -> BatchSlice:
    """This process's slice of the batch.

    Processes whose devices hold rows in common (a tensor axis that spans hosts) have the same
    slice, and read and score the same rows.
    """
    slices = batch_slices(layout)
    return BatchSlice(slices.index(process_batch_parts(layout)), len(slices))


def _all_gather(value: np.ndarray, layout: Layout | None) -> np.ndarray:
    """[processes, ...]: the values of all processes.

    Where devices are in two groups, each process's last one alone takes part: it samples, and the
    host does not wait for an update of the others. Elsewhere all take part: a collective of a few
    devices may not run beside an update's.
    """
    if layout is None or not layout.apart:
        return np.asarray(multihost_utils.process_allgather(value))
    last = {device.process_index: device for device in sorted(jax.devices(), key=lambda d: d.id)}
    mesh = Mesh(np.asarray([last[process] for process in sorted(last)]), ("process",))
    mine = jax.device_put(value[None], last[jax.process_index()])
    shape, rows = (len(last), *value.shape), NamedSharding(mesh, PartitionSpec("process"))
    parts = jax.make_array_from_single_device_arrays(shape, rows, [mine])
    whole = _identity(NamedSharding(mesh, PartitionSpec()))(parts)
    return np.asarray(whole.addressable_data(0))


@functools.cache
def _identity(sharding: NamedSharding) -> Wrapped:
    return jax.jit(lambda value: value, out_shardings=sharding)


def max_over_processes(value: int, layout: Layout | None) -> int:
    """The largest of all processes' values.

    layout: of the run's devices, either group; None: nothing else runs on any of them.
    """
    if jax.process_count() == 1:
        return value
    return int(_all_gather(np.asarray(value, np.int64), layout).max())


def min_over_processes(value: float, layout: Layout | None) -> float:
    """The smallest of all processes' values, each of which is a float32's; see the largest."""
    if jax.process_count() == 1:
        return value
    return float(_all_gather(np.asarray(value, np.float32), layout).min())


def any_process(flag: bool, layout: Layout | None) -> bool:
    """Whether the flag is set in any process; `layout` as for `max_over_processes`."""
    return bool(max_over_processes(int(flag), layout))


def gather(rows: list[T], layout: Layout) -> list[T]:
    """The JSON rows of all slices of the batch, in its order; the same list in every process."""
    if jax.process_count() == 1:
        return rows
    data = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    size = max_over_processes(len(data), layout)
    padded = np.zeros(size + 16, np.uint8)
    padded[: len(data)] = data
    padded[size:].view(np.int64)[:] = (process_batch_slice(layout).index, len(data))
    slices: dict[int, list[T]] = {}
    for message in _all_gather(padded, layout):
        index, length = (int(x) for x in message[size:].copy().view(np.int64))
        slices[index] = json.loads(message[:length].tobytes())
    return [row for index in sorted(slices) for row in slices[index]]


def from_process_zero(rows: list[T], layout: Layout) -> list[T]:
    """The JSON rows of process 0, in every process; those of the others are ignored."""
    if jax.process_count() == 1:
        return rows
    data = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    size = max_over_processes(len(data) if jax.process_index() == 0 else 0, layout)
    message = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        message[:] = data
    broadcast = np.asarray(multihost_utils.broadcast_one_to_all(message))
    return list(json.loads(broadcast.astype(np.uint8).tobytes()))


def wait_for_all(where: str) -> None:
    """Returns once every process has arrived at `where`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)
