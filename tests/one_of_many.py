"""One process of several that run a config: `python one_of_many.py PORT COUNT INDEX CONFIG ...`.

With PAIRS_ACROSS=1 the devices are arranged as a slice's may be: the last device of a process is a
neighbour of the next one's first.
"""

from __future__ import annotations

import os
import sys

import jax
import numpy as np

from r1jax import recipe, sharding
from r1jax.config.load import load_config
from r1jax.stages.rejection_sampling import rewriting


def main() -> int:
    # The miniature's tokenizer has neither letters nor headings: a model is asked with the draft.
    rewriting.instruction_prompt = lambda draft, _: draft.question
    if os.environ.get("PAIRS_ACROSS"):
        vars(sharding)["_arrange"] = lambda devices, axes: np.roll(np.asarray(devices), -1).reshape(
            tuple(axes.values())
        )
    port, count, index = (int(x) for x in sys.argv[1:4])
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
    return recipe.run(load_config(sys.argv[4], sys.argv[5:]))


if __name__ == "__main__":
    raise SystemExit(main())
