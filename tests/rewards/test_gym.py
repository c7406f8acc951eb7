"""Tasks of reasoning-gym: with a stand-in for the package, and with itself where it is there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1jax.data.examples import load_examples
from r1jax.rewards import Outcome, Score, score, score_file
from r1jax.rewards.gym import _gym_dataset
from r1jax.settings.data import DataSection
from r1jax.settings.rewards import VerifierSection


class Doubling:
    """Entries whose metadata JSON cannot hold; half of the reward for a wrong sign."""

    def __init__(self, seed: int, size: int, step: int = 2) -> None:
        assert step > 0, "step must be positive"
        self.seed, self.size, self.step = seed, size, step

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        value = self.step * (self.seed + index)
        return {"question": f"{index}?", "answer": str(value), "metadata": {"right": {value}}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        assert isinstance(entry["metadata"]["right"], set)
        (right,) = entry["metadata"]["right"]
        return 1.0 if answer == str(right) else 0.5 if answer == str(-right) else 0.0


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dataset(name: str, **options: Any) -> Doubling:
        if name != "doubling":
            raise ValueError(f"Dataset {name!r} not registered")
        return Doubling(**options)

    _gym_dataset.cache_clear()
    monkeypatch.setitem(
        sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=create_dataset)
    )


def section(**settings: Any) -> DataSection:
    return DataSection(**{"source": "gym:doubling", "template": "plain", **settings})


@pytest.mark.usefixtures("package")
def test_rows_and_their_reward() -> None:
    examples = load_examples(section(limit=3, options={"seed": 5}))
    assert [(e.prompt, e.answer) for e in examples] == [("0?", "10"), ("1?", "12"), ("2?", "14")]

    def given(text: str) -> Score:
        return score(f"<answer>{text}</answer>", "", "gym", columns=examples[1].columns)

    assert given("12") == Score(1.0, Outcome.RIGHT, "12")
    assert given("-12") == Score(0.5, Outcome.WRONG, "-12")
    assert score("12", "", "gym", columns=examples[1].columns) == Score(0.0, Outcome.UNPARSEABLE)
    assert json.loads(json.dumps(examples[1].columns)) == examples[1].columns
    with pytest.raises(ValueError, match="no column 'gym'"):
        score("<answer>1</answer>", "", "gym")


@pytest.mark.usefixtures("package")
def test_train_and_held_out_are_disjoint() -> None:
    sides = [
        {
            e.prompt
            for e in load_examples(section(split=s, held_out_fraction=0.5, options={"size": 50}))
        }
        for s in ("train", "held_out")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 50


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "gym:halving"}, "gym:halving.*not registered"),
        ({"options": {"stop": 1}}, "gym:doubling.*stop"),
        ({"options": {"step": 0}}, "step must be positive"),
        ({"split": "test"}, "split: a task is one split, train"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples(section(**settings))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _gym_dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'r1jax\[gym\]'"):
        load_examples(section())


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="the extra gym")
def test_a_task_of_the_package_itself(tmp_path: Path) -> None:
    _gym_dataset.cache_clear()
    examples = load_examples(section(source="gym:chain_sum", limit=2, options={"max_terms": 3}))
    rows = [
        {"prompt": e.prompt, "completion": f"<answer>{given}</answer>", **e.columns}
        for e in examples
        for given in (e.answer, "x")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = score_file("gym", path, path, section=VerifierSection(deadline_seconds=60))
    assert (counts[Outcome.RIGHT], counts[Outcome.WRONG]) == (2, 2)
