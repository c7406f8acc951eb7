"""Run a config whose devices are in two groups, and say in which order things happen.

`python two_groups.py CONFIG [key=value]`. The first update has far more to do than all samples of
the next phase. (It cannot wait for them: a CPU's programs that call the host are not queued.)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from r1jax import recipe
from r1jax.config.load import load_config
from r1jax.run.train_loop import PendingUpdate, TrainLoop
from r1jax.stages.grpo import phase

PRODUCTS = 1500
events: list[str] = []
begun: list[PendingUpdate] = []


@jax.jit
def products(step: jax.Array) -> jax.Array:
    """`step`, much later."""
    matrix = jnp.full((300, 300), 1e-3) * step
    turn = lambda _, each: jnp.tanh(each @ each)  # noqa: E731
    return step + (jax.lax.fori_loop(0, PRODUCTS, turn, matrix).sum() > 1e9).astype(step.dtype)


def main() -> int:
    config = load_config(sys.argv[1], sys.argv[2:])
    sample_attempts = phase.sample_attempts
    begin, end = TrainLoop.begin_update, TrainLoop.end_update

    def begin_update(self: TrainLoop, batch: Any) -> PendingUpdate:
        if self.step == 0:
            self.state = replace(self.state, step=products(self.state.step))
        begun.append(begin(self, batch))
        events.append(f"update {self.step} begins")
        return begun[-1]

    def end_update(self: TrainLoop, pending: PendingUpdate) -> Any:
        metrics = end(self, pending)
        events.append(f"update {pending.step} ended")
        return metrics

    def sampling(*args: Any, **options: Any) -> Iterator[Any]:
        for ended in sample_attempts(*args, **options):
            if ended:
                runs = begun and not begun[-1].metrics["loss"].is_ready()
                events.append("samples, while an update runs" if runs else "samples")
            yield ended

    phase.sample_attempts = sampling  # type: ignore[assignment]
    TrainLoop.begin_update = begin_update  # type: ignore[method-assign]
    TrainLoop.end_update = end_update  # type: ignore[method-assign]
    status = recipe.run(config)
    print("EVENTS", json.dumps(events))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
