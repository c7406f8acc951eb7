"""The section `objective` of a stage: kinds, what `loss` hands over, and what is refused."""

from __future__ import annotations

import json

import pytest

from r1jax.config.lineage import changes, ingredients
from r1jax.config.load import ConfigError, dump_config, parse_config
from r1jax.config.run_config import RunConfig
from r1jax.settings.objective import GRPO, GSPO, DrGRPO, OutsideObjective, ReinforcePlusPlus
from r1jax.stages.grpo.settings import GRPOStage

CONFIG = """
name: small
model: {tokenizer: "characters:running_total", config: {model_type: qwen2, vocab_size: 20,
  hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 1}}
data: {train: {source: "task:running_total"}}
rewards: {accuracy: {}}
stages:
  - name: rl
    kind: grpo
    data: train
    steps: 4
    max_new_tokens: 24
    optimizer: {learning_rate: 1.0e-3}
"""


def parsed(*lines: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    text = CONFIG + "".join(f"    {line}\n" for line in lines)
    config = parse_config(text, "a.yaml", overrides)
    assert parse_config(dump_config(config), "dump") == config
    return config


def stage(*lines: str, overrides: tuple[str, ...] = ()) -> GRPOStage:
    (rl,) = parsed(*lines, overrides=overrides).stages
    assert isinstance(rl, GRPOStage)
    return rl


def problem(*lines: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(*lines)
    (text,) = caught.value.problems
    return text


def test_without_one_it_is_grpo_with_the_settings_of_loss() -> None:
    rl = stage("loss: {clip_high: 0.3, kl_coefficient: 0.0}")
    assert rl.objective is None and rl.loss is not None
    assert rl.objective_settings == GRPO(clip_high=0.3, kl_coefficient=0.0)
    assert stage().objective_settings == GRPO()


def test_a_kind_has_the_defaults_of_its_paper_and_takes_what_loss_says() -> None:
    assert stage("objective: {kind: gspo}").objective_settings == GSPO()
    rl = stage("objective: {kind: gspo, clip_low: 0.01}", "loss: {kl_coefficient: 0.1}")
    assert rl.objective_settings == GSPO(clip_low=0.01, kl_coefficient=0.1) and rl.loss is None
    # The constant of Dr. GRPO is the longest completion.
    rl = stage("objective: {kind: dr_grpo}")
    assert rl.objective_settings == DrGRPO(constant_length=24)
    changed = "stages.rl.objective={kind: reinforce_plus_plus, baseline: true}"
    assert stage(overrides=(changed,)).objective_settings == ReinforcePlusPlus(baseline=True)
    by_key = stage(overrides=("stages.rl.objective.kind=grpo", "stages.rl.loss.clip_low=0.1"))
    assert by_key.objective_settings == GRPO(clip_low=0.1)


def test_one_of_the_users_with_options() -> None:
    rl = stage("objective: {kind: 'my.module:mine', options: {weight: 0.5}}")
    assert rl.objective == OutsideObjective(kind="my.module:mine", options={"weight": 0.5})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["objective: {kind: gspo}", "loss: {dual_clip: 3.0}"],
            "a.yaml:16: stages.rl.loss.dual_clip = 3.0: kind gspo has no such setting; leave it",
        ),
        (
            ["objective: {kind: gspo, clip_low: 0.1}", "loss: {clip_low: 0.2}"],
            "stages.rl.loss.clip_low = 0.2: objective.clip_low = 0.1 says another value",
        ),
        (
            ["objective: {kind: 'my.module:mine'}", "loss: {clip_low: 0.1}"],
            "stages.rl.loss.clip_low = 0.1: one of yours has its settings in objective.options",
        ),
        (
            ["objective: {kind: gsp}", "loss: {clip_low: 0.1}"],
            'stages.rl.objective.kind = "gsp": should be grpo or dr_grpo or dapo or gspo or ',
        ),
        (["objective: {clip_low: 0.1}"], "stages.rl.objective.kind is missing: should be grpo or"),
        (
            ["objective: {kind: gspo, clip_lw: 0.1}"],
            "a.yaml:15: stages.rl.objective.clip_lw = 0.1: unknown key; did you mean clip_low",
        ),
        (
            ["objective: {kind: sapo, temperature_positive: '1'}"],
            'stages.rl.objective.temperature_positive = "1": should be a number',
        ),
        (
            ["objective: {kind: grpo, kl_estimator: k1}"],
            "stages.rl.objective: kl_estimator = 'k1' in the loss penalises nothing",
        ),
        (["critic: {warmup_steps: 1}"], "critic belongs to objective.kind ppo, and this is grpo"),
        (
            ["objective: {kind: rloo, importance_cap: null}", "phases_of_lag: 1"],
            "phases_of_lag = 1 with objective.importance_cap = null: nothing would correct",
        ),
        (["objective: gspo"], "stages.rl.objective"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(lines: list[str], expected: str) -> None:
    assert expected in problem(*lines)


def test_a_stage_that_began_before_there_were_objectives_goes_on() -> None:
    config = parsed("loss: {clip_high: 0.3}")
    before = json.loads(json.dumps(ingredients(config, "rl")))
    del before["stages.rl"]["objective"]
    assert changes(before, config, "rl") == []
    other = parsed("objective: {kind: grpo, clip_high: 0.3}")
    assert changes(before, other, "rl")
