"""Choices among samples stand beside the votes."""

from __future__ import annotations

from r1jax.report.stage_table import Checkpoint, by_benchmark, stage_by_stage


def share(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_best_of_k_and_weighted_votes_are_columns_of_the_votes() -> None:
    plain = {"pass_at_1": share(0.4), "cons_at_4": share(0.5), "mean_length": share(9)}
    chosen = {
        "process": {"best_of_2": share(0.6), "best_of_4": share(0.7), "weighted_vote": share(0.8)},
        "margin": {"best_of_4": share(0.3)},
    }
    rows = [
        Checkpoint("base", "pretraining", by_benchmark("maths", 0, plain)),
        Checkpoint("rl", "RL", by_benchmark("maths", 0, {**plain, "chosen_by": chosen})),
    ]
    tables, plots = stage_by_stage(rows)
    (table,) = [each for each in tables if each.title == "Right by a vote"]
    assert [heading.note for heading in table.columns] == [
        "cons@4",
        "best of 4 by process",
        "weighted vote by process",
        "best of 4 by margin",
    ]
    cells = {row.label: [cell.value for cell in cells] for row, cells in table.rows}
    assert cells["rl"] == ["50.0 %", "70.0 %", "80.0 %", "30.0 %"]
    assert cells["base"][0] == "50.0 %" and "70.0 %" not in cells["base"]
    assert "best of 4 by process" in plots[0].legend
