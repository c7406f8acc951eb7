"""The config of an evaluation on benchmarks, for `r1jax eval --benchmark`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from r1jax.files import JsonObject
from r1jax.settings.benchmarks import BENCHMARKS


def evaluation_of(model: str, name: str, benchmarks: Sequence[str]) -> JsonObject:
    """A config, as read from YAML, that evaluates a model on benchmarks, one stage each.

    Args:
      model: a Hugging Face directory or a hub name.
      name: of the model, for titles; the run's name is this with `-eval`.
      benchmarks: their names; loading the config refuses unknown ones.
    """
    names = list(dict.fromkeys(benchmarks))
    seconds = [
        float(str(BENCHMARKS[each].reward_options.get("total_seconds", 5.0)))
        for each in names
        if each in BENCHMARKS
    ]
    return {
        "name": (re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).lstrip("_.-") or "model") + "-eval",
        "title": f"{name} on {', '.join(names)}",
        # Weights in the dtype that they are computed with: nothing is trained.
        "model": {"path": model, "param_dtype": "bfloat16"},
        "verifier": {
            "workers": max(1, (os.cpu_count() or 1) // 2),
            # sympy, or all tests of a program, and some more.
            "deadline_seconds": max(seconds, default=5.0) + 5.0,
        },
        "trackers": [],
        "stages": [{"name": each, "kind": "evaluate", "benchmark": each} for each in names],
    }
