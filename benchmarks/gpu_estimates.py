"""The planner's estimates of programs that were measured on an H200, beside the measurements.

h200_programs.json has the operations of six programs of commit 201b63f, Qwen2.5-1.5B's shape in
bfloat16, as XLA of JAX 0.10.2 compiles them for an H200: FLOPs, bytes, how often, and the name of a
kernel that XLA did not make. They were measured there with JAX 0.11.2, once each. The shares of the
peaks that the estimate uses (r1jax/run/chips.py) are of products, copies and the attention
kernel, each measured alone. The least time of a kernel is fitted to the two tokens of 32 x 8
samples; nothing is fitted to the other four programs.

    python benchmarks/gpu_estimates.py
"""

from __future__ import annotations

import json
from pathlib import Path

from r1jax.planner.estimate import times
from r1jax.planner.hlo import Cost, Operation
from r1jax.planner.topologies import Slice
from r1jax.run.chips import CHIPS

MEASURED = Path(__file__).with_name("h200_programs.json")


def estimates() -> list[tuple[str, float, float]]:
    """(program, seconds estimated, seconds measured) of each."""
    rows = []
    for each in json.loads(MEASURED.read_text(encoding="utf-8")):
        operations = tuple(Operation(*operation) for operation in each["operations"])
        found = times(Cost(operations, ()), Slice("h200:1", (), CHIPS["h200"]))
        assert found is not None
        rows.append((each["program"], found.total, each["measured"]))
    return rows


def main() -> None:
    print("| program | estimated | measured | off by |")
    print("|---|---|---|---|")
    for program, estimated, measured in estimates():
        off = estimated / measured - 1
        print(f"| {program} | {1e3 * estimated:,.1f} ms | {1e3 * measured:,.1f} ms | {off:+.0%} |")


if __name__ == "__main__":
    main()
