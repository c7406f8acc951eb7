"""Stages store the same samples whatever the slots and the budget of their cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from r1jax import recipe
from r1jax.config.load import load_config

TINY = Path(__file__).parents[1] / "tiny.yaml"


def run(output: Path, sampling: dict[str, Any]) -> Path:
    plan = yaml.safe_load(TINY.read_text())
    plan["model"]["config"]["num_hidden_layers"] = 1
    zero = plan["stages"][2] | {"steps": 4, "sampling": sampling}
    zero["held_out_sampling"] = sampling
    after = {"name": "after", "kind": "evaluate", "data": "held_out", "samples_per_problem": 4}
    after |= {"problems_per_batch": 2, "max_new_tokens": 16, "sampling": sampling}
    plan |= {"output": str(output), "stages": [zero, after]}
    output.mkdir()
    (output / "config.yaml").write_text(yaml.safe_dump(plan))
    assert recipe.run(load_config(str(output / "config.yaml"))) == 0
    return output / "tiny-s0/stages"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_slots_and_budget_change_no_sample_and_no_order(tmp_path: Path) -> None:
    sampling = {"temperature": 0.9}
    default = run(tmp_path / "default", sampling)
    slots = run(tmp_path / "slots", sampling | {"slots": 3, "cache_tokens": 256})
    for name in ("00-zero/samples.jsonl", "01-after/samples.jsonl", "00-zero/held_out.jsonl"):
        assert rows(slots / name) == rows(default / name), name
    for a, b in zip(
        rows(slots / "00-zero/metrics.jsonl"), rows(default / "00-zero/metrics.jsonl"), strict=True
    ):
        assert abs(a["optimizer/grad_norm"] - b["optimizer/grad_norm"]) < 1e-3
    uses = [row.get("rollout/slot_use") for row in rows(slots / "00-zero/timings.jsonl")]
    assert all(use is not None and 0 < use <= 1 for use in uses)
