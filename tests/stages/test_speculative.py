"""A run whose model has the module: it is trained, drafts in the rollout, and is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.models import abstract_params
from r1jax.run.models import build_decoder
from r1jax.settings.model import ModelSection
from r1jax.sharding import single_device
from r1jax.stages.grpo.metrics import rollout_metrics
from r1jax.weights.hugging_face import load_params, read_config

TINY = Path(__file__).parents[1] / "tiny.yaml"


def config(output: Path, **of_model: Any) -> RunConfig:
    plan = yaml.safe_load(TINY.read_text())
    plan["model"] |= {"multi_token_prediction": True, **of_model}
    plan["model"]["config"]["num_nextn_predict_layers"] = 1
    base, before, zero = plan["stages"]
    weights = [{"step": 0, "weight": 0.3}, {"step": 4, "weight": 0.1}]
    base["mtp_weight"] = weights
    zero |= {"steps": 2, "mini_batches_per_rollout": 1, "sampling": {"speculative": True}}
    del zero["held_out"]
    before["sampling"] = {"speculative": True, "temperature": 0.9}
    plan |= {"output": str(output), "stages": [base, before, zero]}
    output.mkdir(exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(plan))
    return load_config(str(output / "config.yaml"))


def test_a_run_trains_the_module_and_drafts_with_it(tmp_path: Path) -> None:
    plan = config(tmp_path)
    assert recipe.run(plan) == 0

    def metrics(stage: str) -> list[dict[str, Any]]:
        (path,) = tmp_path.glob(f"*/stages/*-{stage}/metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    trained = [row for row in metrics("base") if "loss" in row]
    losses = [row["mtp/loss"] for row in trained]
    assert losses[0] == pytest.approx(np.log(20), rel=0.1) and losses[-1] < losses[0]
    assert all(0 <= row["mtp/acceptance"] <= 1 for row in trained)
    rollouts = [row for row in metrics("zero") if "speculative/acceptance" in row]
    assert len(rollouts) == 2
    for row in rollouts:
        assert 0 < row["speculative/acceptance"] < 1 < row["speculative/tokens_per_step"] < 2
        # Other than in their speed, they are the policy's own samples.
        assert row["sampler/gap_max"] < 1e-3
    (exported,) = tmp_path.glob("*/stages/*-zero/**/config.json")
    assert read_config(exported.parent)["num_nextn_predict_layers"] == 1
    section = ModelSection(path=str(exported.parent), multi_token_prediction=True)
    decoder, _ = build_decoder(section, single_device())
    params = load_params(exported.parent, decoder.config, decoder.layout)
    expected = abstract_params(decoder.config, decoder.layout, np.float32)
    assert params["prediction"]["join"].shape == expected["prediction"]["join"].shape


def test_what_needs_a_module_is_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        config(tmp_path, multi_token_prediction=False)
    assert "stages.base.mtp_weight needs the module" in str(error.value)
    assert "model.multi_token_prediction to true" in str(error.value)


def test_the_figures_of_drafts_by_hand() -> None:
    fact = {"outcome": "right", "domain": "", "reward": 1.0, "parts": {}, "truncated": False}
    plain = {**fact, "length": 5, "drafted": 0, "accepted": 0}
    assert not any(name.startswith("speculative") for name in rollout_metrics([plain], [False]))
    # 1 + (2 + 2 + 1), and 1 + (1 + 2): the last draft of the first stayed and ended it.
    one = {**fact, "length": 6, "drafted": 3, "accepted": 3}
    other = {**fact, "length": 4, "drafted": 2, "accepted": 1}
    found = rollout_metrics([one, other], [False])
    assert found["speculative/acceptance"] == pytest.approx(4 / 5)
    assert found["speculative/tokens_per_step"] == pytest.approx(8 / 5)
