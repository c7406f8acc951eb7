"""Run a config and die at a chosen point: `python killed_run.py POINT NUMBER CONFIG [key=value]`.

POINT is `none`, or where the process ends itself at the NUMBER-th time it gets there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1jax import recipe
from r1jax.checkpoints import Checkpoints
from r1jax.config.load import load_config
from r1jax.metrics.recorder import Recorder
from r1jax.rollouts import sampling
from r1jax.rollouts.scoring import RewardScorer
from r1jax.weights.hugging_face import exporting


def die_in(owner: Any, name: str, number: int, last_words: Callable[..., None]) -> None:
    """Replace owner.name: its NUMBER-th call starts with `last_words(*arguments)`."""
    original, calls = getattr(owner, name), [0]

    def replaced(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            last_words(*args)
        return original(*args, **options)

    setattr(owner, name, replaced)


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_once_half_written(checkpoints: Checkpoints, *_: Any) -> None:
    def watch() -> None:
        while not any(path.is_file() for path in _partial(checkpoints.directory)):
            pass
        kill()

    threading.Thread(target=watch, daemon=True).start()


def _partial(directory: Path) -> list[Path]:
    found: list[Path] = []
    for folder in directory.glob("*tmp*"):
        try:
            found.extend(folder.rglob("*"))
        except OSError:
            continue  # renamed or removed while we looked
    return found


def main() -> int:
    point, number = sys.argv[1], int(sys.argv[2])
    if point == "log":
        die_in(Recorder, "log", number, kill)
    elif point == "samples":
        die_in(Recorder, "log_samples", number, kill)
    elif point == "save":
        die_in(Checkpoints, "save", number, kill_once_half_written)
    elif point == "export":
        die_in(exporting, "write_weights", number, kill)
    elif point == "sigterm":
        die_in(Recorder, "log", number, ask_to_stop)
    elif point == "sigterm_in_judging":
        die_in(RewardScorer, "submit", number, ask_to_stop)
    elif point == "sigterm_in_rollout":
        die_in(sampling, "sample_queue", number + 1, kill)  # it is not gone on with
        die_in(sampling, "sample_queue", number, ask_to_stop)
    return recipe.run(load_config(sys.argv[3], sys.argv[4:]))


if __name__ == "__main__":
    raise SystemExit(main())
