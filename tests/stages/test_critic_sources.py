"""A reward model becomes a critic, PPO trains it on chosen groups, and a search uses its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from r1jax import recipe
from r1jax.config.lineage import Edge, edges
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.models import TokenRows
from r1jax.models.reward_head import token_values
from r1jax.planner.dry_run import describe
from r1jax.run.models import LanguageModel
from r1jax.run.resolve import check, resolve
from r1jax.stages.grpo.critic import Critic

TESTS = Path(__file__).parents[1]
SCORES: dict[str, Any] = {
    **{"name": "scores", "kind": "reward_model", "weights": "model", "data": "labelled"},
    **{"loss": "pointwise", "reads": "response", "steps": 2, "rows_per_step": 4, "max_tokens": 64},
    **{"length_bucket": 64, "log_every": 1, "optimizer": {"learning_rate": 0.05}},
}
# As many samples as it takes: until there are groups whose rewards differ.
CHOSEN: dict[str, Any] = {
    **{"weights": "model", "steps": 2, "objective": {"kind": "ppo", "value_clip": None}},
    # From below 0 it comes near the rewards, which are 0 or 1.
    "critic": {"weights": "scores", "optimizer": {"learning_rate": 0.04}},
    **{"dynamic_sampling": {"max_questions": 12, "questions_at_once": 4}},
}
SEARCH: dict[str, Any] = {
    **{"name": "tree", "kind": "evaluate", "data": "train", "problems": 3, "max_new_tokens": 8},
    **{"problems_per_batch": 3, "sampling": {"slots": 8}},
    "search": {
        **{"kind": "mcts", "valued_by": "rl", "expansions": 2, "max_step_tokens": 4},
        **{"budget_tokens": 32, "step_rule": {"separators": ["1", "2", "3", "4", "="]}},
    },
}


def plan(output: Path, **changes_of_rl: Any) -> RunConfig:
    config = yaml.safe_load((TESTS / "tiny_ppo.yaml").read_text())
    stages = [SCORES, {**config["stages"][0], **CHOSEN, **changes_of_rl}, SEARCH]
    labelled = {"source": "jsonl:tiny_safety.jsonl", "template": "plain"}
    changes = [f"stages={json.dumps(stages)}", f"data.labelled={json.dumps(labelled)}"]
    return load_config(TESTS / "tiny_ppo.yaml", [f"output={output}", *changes])


def values_of(model: LanguageModel, params: Any, rows: TokenRows) -> np.ndarray:
    values = jax.jit(token_values, static_argnames="model")
    return np.asarray(values(params, rows, model.decoder))


def test_a_critic_of_a_search_is_in_the_plan_and_in_the_lineage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS)
    config = plan(tmp_path)
    assert "tree: reward models" in [each["what"] for each in describe(config)["memory"]]
    assert Edge("rl", "tree", "critic") in edges(config)
    with pytest.raises(ConfigError, match='valued_by = "rl": rl has no critic; name a stage with'):
        check(resolve(plan(tmp_path, objective={"kind": "grpo"}, critic=None)))


@pytest.mark.slow
def test_a_reward_model_becomes_a_critic_that_values_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS)
    monkeypatch.syspath_prepend(str(TESTS))
    learnt, update = [], Critic.update

    def kept(self: Critic, loop: Any, batch: Any) -> Any:
        learnt.append(jax.device_get(batch))
        return update(self, loop, batch)

    monkeypatch.setattr(Critic, "update", kept)
    config = plan(tmp_path)
    assert recipe.run(config) == 0
    stages = next(tmp_path.glob("*/stages"))
    models = resolve(config).models
    critic = models.critic_of("rl")

    # The first values of PPO are the outputs of the reward model.
    first, trained = learnt[0], np.asarray(learnt[0].mask) > 0
    names = ("tokens", "positions", "segment_ids")
    rows = TokenRows(*(first.inputs[name] for name in names))
    outputs = values_of(critic, critic.load(stages / "00-scores/model"), rows)
    np.testing.assert_allclose(first.values[trained], outputs[trained], atol=1e-5)
    assert np.abs(outputs[trained]).max() > 0.01
    metrics = [json.loads(x) for x in (stages / "01-rl/metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and metrics[0]["questions/sampled"] >= 4
    for row in metrics:
        assert row["critic/finite"] == 1 and row["critic/grad_norm"] > 0
        # Groups without a spread are left out, and the critic learns from the others.
        assert row["groups/trained"] == 4

    # A beginning has the critic's value behind its last token; a solution that before it.
    params = critic.load(stages / "01-rl/critic")
    found = []
    for line in (stages / "02-tree/trees.jsonl").read_text().splitlines():
        tree = json.loads(line)
        nodes = tree["nodes"]
        for index, node in enumerate(nodes[1:], start=1):
            text, at = "", index
            while at:
                text, at = nodes[at]["text"] + text, nodes[at]["parent"]
            ids = critic.tokenizer.encode(tree["prompt"] + text, add_special_tokens=False)
            behind = len(ids)  # an EOS is not in the text
            row = np.zeros((1, 64), np.int32)
            row[0, : len(ids)] = ids
            real = (np.arange(64) < behind + 1)[None].astype(np.int32)
            value = values_of(critic, params, TokenRows(row, np.arange(64)[None], real))[0, behind]
            assert node["value"] == pytest.approx(min(1, max(0, value)), abs=1e-4), node
            found.append(node["value"])
    assert len(found) > 6 and any(0.02 < value < 0.98 for value in found), found
