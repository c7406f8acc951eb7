"""What decides the result of a stage, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1jax.config.lineage import changes, differences, ingredients
from r1jax.config.load import load_config

CONFIG = str(Path(__file__).parents[1] / "tiny_r1.yaml")


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("seed=7", "seed: 0 -> 7"),
        ("stages.base.row_tokens=16", "stages.base.row_tokens"),  # of a stage that it rests on
        ("model.config.hidden_size=48", "model.config.hidden_size"),
        ("data.questions.limit=3", "data.questions.limit"),
    ],
)
def test_what_decides_a_result_is_among_its_ingredients(change: str, changed: str) -> None:
    before, after = (ingredients(load_config(CONFIG, c), "tuned") for c in ([], [change]))
    assert any(changed in line for line in differences(before, after))


@pytest.mark.parametrize(
    "change", ["output=elsewhere", "trackers=[]", "mesh.cpu_devices=1", "stages.rl.steps=40"]
)
def test_what_decides_nothing_is_not(change: str) -> None:
    before, after = (ingredients(load_config(CONFIG, c), "tuned") for c in ([], [change]))
    assert list(differences(before, after)) == []


def test_settings_that_decide_nothing_may_change_once_a_stage_has_begun() -> None:
    began_with = ingredients(load_config(CONFIG), "tuned")
    free = ["stages.base.checkpoint_every=7", "stages.tuned.keep_checkpoints=9"]
    assert changes(began_with, load_config(CONFIG, free), "tuned") == []
    locked = load_config(CONFIG, [*free, "stages.base.rows_per_step=64"])
    assert changes(began_with, locked, "tuned") == ["stages.base.rows_per_step: 4 -> 64"]
