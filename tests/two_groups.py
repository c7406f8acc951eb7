"""Run a config whose devices are in two groups, and say in which order things happen.

`python two_groups.py CONFIG [key=value]`. The first update of a phase ends only when samples of the
next phase are there, and these only when the update has begun: each waits for the other, so that a
run which did one after the other would time out.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import io_callback

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.stages.grpo import phase, stage

WAIT = 60.0  # seconds, after which the order is not what it should be
events: list[str] = []
begun, sampled = threading.Event(), threading.Event()
updates = 0


def main() -> int:
    config = load_config(sys.argv[1], sys.argv[2:])
    (rl,) = config.stages
    of_phase, phases = rl.mini_batches_per_rollout, rl.steps // rl.mini_batches_per_rollout
    make_update, sample_prompts = stage.make_update, phase.sample_prompts

    def in_update() -> Any:
        global updates
        number, first = divmod(updates, of_phase)
        updates += 1
        if first == 0:
            events.append(f"update {number} begins")
            if number < phases - 1:
                begun.set()
                met = sampled.wait(WAIT)
                sampled.clear()
                events.append(f"update {number} ends" if met else "nothing was sampled")
        return jnp.float32(0)

    def watched(*args: Any) -> Any:
        update = make_update(*args)

        def with_callback(state: Any, batch: Any) -> Any:
            state, metrics = update(state, batch)
            waited = io_callback(in_update, jax.ShapeDtypeStruct((), jnp.float32))
            return state, {**metrics, "waited": waited}

        return with_callback

    def sampling(*args: Any, **options: Any) -> Iterator[Any]:
        number = sampling.calls  # type: ignore[attr-defined]
        sampling.calls += 1  # type: ignore[attr-defined]
        first = True
        for ended in sample_prompts(*args, **options):
            if first and number:
                met = begun.wait(WAIT)
                begun.clear()
                events.append(f"samples {number}" if met else "no update was under way")
                sampled.set()
            first = False
            yield ended

    sampling.calls = 0  # type: ignore[attr-defined]
    stage.make_update, phase.sample_prompts = watched, sampling  # type: ignore[assignment]
    status = recipe.run(config)
    print("EVENTS", json.dumps(events))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
