"""Which weights the reference policy has at first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config, parse_config
from r1jax.run.resolve import check, resolve

CONFIG = """
name: tiny-reference
model: &tiny
  tokenizer: characters:running_total
  compute_dtype: float32
  remat: none
  log_prob_chunk: 8
  config: {model_type: qwen2, vocab_size: 20, hidden_size: 16, intermediate_size: 32,
    num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, tie_word_embeddings: true}
models: {other: *tiny}
data: {train: {source: "task:running_total", template: plain, limit: 24}}
rewards: {even: {function: "tiny_rewards:even_digits"}}
trackers: []
stages:
  - {name: base, kind: pretrain, data: train, steps: 4, rows_per_step: 4, row_tokens: 64,
     optimizer: {learning_rate: 0.05}}
  - &rl {name: own, kind: grpo, data: train, steps: 1, questions_per_step: 2, samples_every: 1,
     outputs_per_question: 4, max_new_tokens: 8, length_bucket: 16,
     optimizer: {learning_rate: 0.01}}
  - {<<: *rl, name: first, reference: model}
"""


def test_it_has_the_weights_of_the_stage_or_of_the_one_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    config = load_config(str(path), [f"output={tmp_path}", "verifier.workers=1"])
    assert recipe.run(config) == 0
    kl = {}
    for name in ("own", "first"):
        (metrics,) = tmp_path.glob(f"tiny-reference*/stages/*-{name}/metrics.jsonl")
        kl[name] = json.loads(metrics.read_text().splitlines()[0])["policy/kl"]
    # Before any update the policy is what its stage starts from.
    assert abs(kl["own"]) < 1e-6
    assert kl["first"] > 1e-3


def test_what_is_no_reference_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"first\.reference = 'other' has weights of the model"):
        parse_config(CONFIG.replace("reference: model", "reference: other"), "a.yaml")
    with pytest.raises(ConfigError, match=r"first\.reference = 'own2': neither an earlier"):
        parse_config(CONFIG.replace("reference: model", "reference: own2"), "a.yaml")
    changed = CONFIG.replace("reference: model", "reference: base, loss: {kl_coefficient: 0}")
    config = parse_config(changed, "a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml.*reference.*no penalty on KL"):
        check(resolve(config))
