"""`r1jax run` joins the other processes when, and only when, the environment names some."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import forked
import jax
import pytest

from r1jax.processes import join_processes

TESTS = Path(__file__).parents[1]
SIGNS = (
    "JAX_COORDINATOR_ADDRESS",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_NUM_SLICES",
    "R1JAX_MULTI_HOST",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `jax.distributed.initialize` was called with: address, count, index."""
    made: list[tuple[Any, ...]] = []

    def initialize(address: str | None, num_processes: int | None, process_id: int | None) -> None:
        made.append((address, num_processes, process_id))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return made


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {name: "" for name in SIGNS},
        # A slice of one host has its own name there.
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_PROCESS_ADDRESSES": "localhost:8476"},
        {"MEGASCALE_NUM_SLICES": "1"},
        {"R1JAX_MULTI_HOST": "0"},
        # Of no use without an address.
        {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
    ],
)
def test_one_process_joins_nobody(
    environment: dict[str, str], calls: list[tuple[Any, ...]]
) -> None:
    join_processes(environment)
    assert calls == []


@pytest.mark.parametrize(
    ("environment", "call"),
    [
        ({"R1JAX_MULTI_HOST": "1"}, (None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (None, None, None)),
        ({"TPU_PROCESS_ADDRESSES": "a:8476,b:8476"}, (None, None, None)),
        ({"MEGASCALE_NUM_SLICES": "2"}, (None, None, None)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", None, None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            ("a:1", 4, 3),
        ),
    ],
)
def test_signs_of_others(
    environment: dict[str, str], call: tuple[Any, ...], calls: list[tuple[Any, ...]]
) -> None:
    join_processes(environment)
    assert calls == [call]


def test_joins_once(calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    join_processes({"R1JAX_MULTI_HOST": "1"})
    assert calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = two: .* from 1 on"),
        ({"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES = 0"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID = -1: .* from 0 on"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID = 2: .* 0 to 1"),
    ],
)
def test_bad_numbers_are_named(
    changes: dict[str, str], message: str, calls: list[tuple[Any, ...]]
) -> None:
    with pytest.raises(ValueError, match=message):
        join_processes({"JAX_COORDINATOR_ADDRESS": "a:1"} | changes)
    assert calls == []


def command(**environment: str) -> forked.Process:
    """`r1jax run --dry-run` on one CPU device: reads, joins, and says how large the mesh is."""
    inherited = {name: value for name, value in os.environ.items() if name not in SIGNS}
    return forked.Process(
        *("-m", "r1jax", "run", "tiny_processes.yaml", "--dry-run", "mesh.cpu_devices=1"),
        cwd=TESTS,
        env=inherited
        | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        | environment,
        one_output=True,
    )


def test_two_commands_are_one_run_of_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        command(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index))
        for index in range(2)
    ]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "devices: 2 x cpu" in said[0] and "parameters: " in said[0]
    assert said[1] == ""  # process 0 speaks for all


def test_the_command_says_when_there_is_nobody_to_join() -> None:
    process = command(R1JAX_MULTI_HOST="1")
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 2
    assert "R1JAX_MULTI_HOST = 1" in said and "JAX_COORDINATOR_ADDRESS=HOST:PORT" in said
