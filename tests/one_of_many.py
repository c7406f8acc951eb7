"""One process of several that run a config: `python one_of_many.py PORT COUNT INDEX CONFIG ...`."""

from __future__ import annotations

import sys

import jax

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.stages.rejection_sampling import rewriting


def main() -> int:
    # The miniature's tokenizer has neither letters nor headings: a model is asked with the draft.
    rewriting.instruction_prompt = lambda draft, _: draft.question
    port, count, index = (int(x) for x in sys.argv[1:4])
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
    return recipe.run(load_config(sys.argv[4], sys.argv[5:]))


if __name__ == "__main__":
    raise SystemExit(main())
