"""`r1jax` on one host of several, with an accident: `python host_of_many.py POINT NUMBER run ...`.

POINT is `none`, or where the accident happens as this process gets there for the NUMBER-th time.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

from killed_run import ask_to_stop, die_in, kill

from r1jax import cli, recipe
from r1jax.data.examples import load_examples
from r1jax.rollouts.scoring import RewardScorer
from r1jax.run import datasets
from r1jax.sharding import split_cpu


def fail(*_: Any) -> None:
    raise OSError("the disk of this host is full")


def other_jaxlib(name: str) -> str:
    return "0.0.1" if name == "jaxlib" else importlib.metadata.version(name)


def main() -> None:
    point, number = sys.argv[1], int(sys.argv[2])
    if point == "killed_before_an_update":
        die_in(RewardScorer, "in_order", number, kill)
    elif point == "killed_as_it_begins":
        die_in(recipe, "open_record", number, kill)
    elif point == "sigterm_before_an_update":
        die_in(RewardScorer, "in_order", number, ask_to_stop)
    elif point == "fails_alone":
        die_in(recipe, "open_record", number, fail)
    elif point == "another_jaxlib":
        vars(recipe)["version"] = other_jaxlib
    elif point == "another_device":
        vars(recipe)["split_cpu"] = lambda devices: split_cpu(devices + 1)
    elif point == "shorter_data":
        vars(datasets)["load_examples"] = lambda section: load_examples(section)[number:]
    sys.argv[1:] = sys.argv[3:]
    cli.app()


if __name__ == "__main__":
    main()
