"""Held-out evaluation in training is the evaluate stage's, and training goes on as without it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from r1jax import recipe
from r1jax.config.lineage import ingredients
from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.rollouts import sampling
from r1jax.run.resolve import resolve
from r1jax.stages.grpo import held_out
from r1jax.stages.grpo.settings import GRPOStage

TINY = Path(__file__).parents[1] / "tiny.yaml"


def config(output: Path, **changes: Any) -> RunConfig:
    """RL from the first weights on, and an evaluation of the last ones on problems of two domains.

    3 + 3 problems in batches of at most 2 (two questions of a phase of four), whose 6 samples come
    in parts of 2: what divides them, and the group of 4.
    """
    plan = yaml.safe_load(TINY.read_text())
    plan["model"]["config"]["num_hidden_layers"] = 1
    held_out = plan["data"].pop("held_out") | {"limit": 3}
    other = {**held_out, "options": {"min_terms": 6, "max_terms": 7}}
    plan["data"] |= {"a": {**held_out, "domain": "a"}, "b": {**other, "domain": "b"}}
    plan["data"]["both"] = {"mixture": {"a": 1, "b": 1}}
    zero = plan["stages"][2] | {
        **{"steps": 4, "held_out": "both", "held_out_every": 2, "held_out_samples": 6},
        "max_new_tokens": [{"step": 0, "tokens": 8}, {"step": 4, "tokens": 16}],
        **changes,
    }
    after = {"name": "after", "kind": "evaluate", "data": "both", "samples_per_problem": 6}
    after |= {"problems_per_batch": 2, "samples_per_batch": 2, "max_new_tokens": 16}
    after["sampling"] = {"temperature": 0.9}
    plan |= {"output": str(output), "stages": [zero, after]}
    output.mkdir()
    (output / "config.yaml").write_text(yaml.safe_dump(plan))
    return load_config(str(output / "config.yaml"))


def test_the_last_one_is_what_an_evaluation_of_the_last_weights_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    sample_queue = sampling.sample_queue

    def watched(*args: Any, **options: Any) -> Any:
        sizes.append((args[3].slots, args[3].samples))
        return sample_queue(*args, **options)

    monkeypatch.setattr(sampling, "sample_queue", watched)
    assert recipe.run(config(tmp_path / "with", held_out_sampling={"temperature": 0.9})) == 0
    zero, after = (tmp_path / "with/tiny-s0/stages" / name for name in ("00-zero", "01-after"))
    rows = [json.loads(line) for line in (zero / "held_out.jsonl").read_text().splitlines()]
    assert [row.pop("step") for row in rows] == [0, 2, 4]
    assert rows[-1] == json.loads((after / "summary.json").read_text())
    assert rows[0] != rows[1] != rows[-1]
    assert (rows[0]["problems"], rows[0]["samples"]) == (6, 6)
    assert set(rows[0]["by_domain"]) == {"a", "b"}
    # The limit of the step: 8 tokens up to the change at step 4.
    assert (
        max(row["mean_length"]["value"] for row in rows[:2]) <= 8 < rows[2]["mean_length"]["high"]
    )
    # No more at once than in a rollout: 2 questions of 4 samples, in parts of 2. Held-out problems
    # are one queue each time; the stage's 18 parts are a queue of eight batches and another.
    rollouts = [size for size in sizes if size[1] == 4]
    assert (len(rollouts), sizes.count((4, 2))) == (2, 3 + 2)
    told = capsys.readouterr().out
    assert told.count("zero: held out at step") == 3
    assert f"step 4: accuracy {rows[2]['pass_at_1']['value']:.3g}, length" in told
    seconds = json.loads((tmp_path / "with/tiny-s0/run.json").read_text())["stages"]["zero"]
    assert seconds["seconds"]["held_out"] > 0

    assert recipe.run(config(tmp_path / "without", held_out=None), recipe.Selection("zero")) == 0
    alone = tmp_path / "without/tiny-s0/stages/00-zero"
    assert (alone / "held_out.jsonl").read_bytes() == b""
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert (alone / name).read_bytes() == (zero / name).read_bytes(), name


def test_few_problems_are_one_batch_of_their_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = config(tmp_path / "run", held_out_every=6)
    stage = plan.stages[0]
    assert isinstance(stage, GRPOStage)
    asked: list[Any] = []
    monkeypatch.setattr(held_out, "scored_batches", lambda *given: asked.append(given[-2]) or [])
    for step, batch in ((0, 1000), (2, 1000), (4, 4)):
        loop = SimpleNamespace(step=step, state=SimpleNamespace(params=None), held_out_step=None)
        evaluations = held_out.HeldOutEvaluation(stage, resolve(plan), batch=batch)
        due: Any = pytest.raises(ValueError, match="nothing was evaluated")
        with nullcontext() if step == 2 else due:
            evaluations.evaluate_if_due(loop, None, None, None)  # type: ignore[arg-type]
    # 6 problems of 6 samples in parts of 2; at the stage's end, but not between, one is due.
    assert asked == [18, 4]


def test_what_is_asked_of_the_config(tmp_path: Path) -> None:
    def stage(**changes: Any) -> RunConfig:
        return config(tmp_path / str(len(list(tmp_path.iterdir()))), **changes)

    with pytest.raises(ValueError, match=r"held_out_every = 3 is not a multiple of mini_b.* = 2"):
        stage(held_out_every=3)
    assert isinstance(stage(held_out=None, held_out_every=3).stages[0], GRPOStage)
    with pytest.raises(ValueError, match=r"stages\.zero\.held_out = 'bth': not one of the datas"):
        stage(held_out="bth")
    assert "data.b" in ingredients(stage(), "zero")
    assert "data.b" not in ingredients(stage(held_out=None), "zero")


def test_every_held_out_problem_needs_a_reward(tmp_path: Path) -> None:
    plan = config(tmp_path / "run")
    rewards = {
        name: r.model_copy(update={"domains": ["arithmetic", "a"]})
        for name, r in plan.rewards.items()
    }
    with pytest.raises(ValueError, match=r"stages\.zero: no reward is for the domain 'b' of data"):
        recipe.run(plan.model_copy(update={"rewards": rewards}))
