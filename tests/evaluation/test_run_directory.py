"""Which models of a run write text."""

from __future__ import annotations

import json
from pathlib import Path

from r1jax.evaluation.run_directory import language_models


def test_reward_models_of_both_kinds_are_no_language_models(tmp_path: Path) -> None:
    heads = ("CausalLM", "TokenClassification", "SequenceClassification")
    for number, head in enumerate(heads):
        model = tmp_path / "stages" / f"{number:02d}-stage" / "model"
        model.mkdir(parents=True)
        content = {"architectures": [f"Qwen2For{head}"]}
        (model / "config.json").write_text(json.dumps(content))
    assert [path.parent.name for path in language_models(tmp_path)] == ["00-stage"]
