"""GRPO steps of r1jax and of other libraries on the same workload, run in turn.

Each library is in an environment of its own (see `peers/`), whose Python is given. Every round runs
one after the other, each as a process of its own; the first two steps of each, which compile, are
left out. Prints each library's median step and its ratio to ours.

    python benchmarks/beside_peers.py [--trl PYTHON] [--tunix PYTHON] [--long-tail] [--rounds N]

`--long-tail`: geometric lengths with mean 64 and at most 512, in place of 64 tokens each. The
ratios vary with the machine and with what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COMPILING = 2  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="Python of an environment with TRL")
    parser.add_argument("--tunix", help="Python of an environment with tunix")
    parser.add_argument("--long-tail", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ours = "long_tailed_step.py" if arguments.long_tail else "rollout_and_update.py"
    option = ["--long-tail"] if arguments.long_tail else []
    commands = {"r1jax": [sys.executable, str(HERE / ours)]}
    for name, python in (("trl", arguments.trl), ("tunix", arguments.tunix)):
        if python:
            commands[name] = [python, str(HERE / "peers" / f"{name}_step.py"), *option]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for index in range(arguments.rounds):
        for name, command in commands.items():
            steps = _steps(command)[COMPILING:]
            seconds[name] += steps
            print(f"round {index}: {name} {statistics.median(steps):.3f} s a step", flush=True)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        ratio = medians["r1jax"] / median
        print(f"{name}: {median:.3f} s a step; r1jax takes {ratio:.2f} of it ({1 / ratio:.2f} x)")


def _steps(command: list[str]) -> list[float]:
    """Seconds of each step: the last line of JSON that the command prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found = [line for line in done.stdout.splitlines() if line.startswith('{"step_seconds"')]
    steps: list[float] = json.loads(found[-1])["step_seconds"]
    return steps


if __name__ == "__main__":
    main()
