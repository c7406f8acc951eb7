"""What a person from outside does in five lines, against transformers on the same directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import r1jax
from r1jax.pretrained import stream_completions
from r1jax.settings.sampling import SamplingSection

NAMES = [
    "GRPOBatch",
    "GRPOConfig",
    "__version__",
    "group_advantages",
    "init_train_state",
    "load_model",
    "log_probs",
    "make_grpo_step",
    "make_policy_step",
    "sample",
    "score",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_checkpoint import make_model

    path = tmp_path_factory.mktemp("pretrained") / "model"
    make_model(path)
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> r1jax.pretrained.PretrainedModel:
    return r1jax.load_model(str(directory), mesh={"fsdp": -1}, dtype="float32")


def test_log_probs_are_those_of_transformers(
    directory: Path, model: r1jax.pretrained.PretrainedModel
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    texts = [model.tokenizer.encode("12 plus 7 is 19."), model.tokenizer.encode("no")]
    found = np.asarray(r1jax.log_probs(model, texts, temperature=0.5))
    assert found.shape == (2, len(texts[0]))
    reference = AutoModelForCausalLM.from_pretrained(directory)
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([text])).logits[0] / 0.5
        wanted = torch.log_softmax(logits, -1)[range(len(text) - 1), text[1:]].numpy()
        np.testing.assert_allclose(row[1 : len(text)], wanted, atol=1e-5)
        assert row[0] == 0 and not row[len(text) :].any()
    with pytest.raises(ValueError, match=r"tokens have lengths \[16, 0\]"):
        r1jax.log_probs(model, [texts[0], []])


def test_samples_depend_on_prompt_and_seed_alone(
    model: r1jax.pretrained.PretrainedModel,
) -> None:
    def draw(prompts: list[str], seed: int) -> list[list[str]]:
        return r1jax.sample(
            model, prompts, samples=2, max_new_tokens=8, template="plain", seed=seed
        )

    both = draw(["7+5=", "a longer prompt"], seed=1)
    assert [len(texts) for texts in both] == [2, 2] and both[0][0] != both[0][1]
    assert draw(["7+5="], seed=1)[0] == both[0] != draw(["7+5="], seed=2)[0]
    with pytest.raises(ValueError, match="prompts is empty"):
        r1jax.sample(model, [])
    with pytest.raises(ValueError, match="max_new_tokens"):
        r1jax.sample(model, ["7+5=" * 300], max_new_tokens=32_000, template="plain")


def test_a_stream_ends_where_the_positions_do(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = 8
    (copy / "config.json").write_text(json.dumps(config))

    def draw(prompt: str, max_new_tokens: int | None) -> str:
        greedy = SamplingSection(temperature=0)
        drawn = stream_completions(str(copy), prompt, greedy, 1, max_new_tokens, 0, "plain")
        return "".join(text for _, text in drawn)

    assert draw("7+5=", None) == draw("7+5=", 4) != ""
    with pytest.raises(ValueError, match="of 4 tokens and 5 new ones: .* = 8; lower .* 4"):
        draw("7+5=", 5)
    with pytest.raises(ValueError, match="of 40000 tokens and .* = 8; shorten the prompt"):
        draw("7+5=" * 10_000, None)


def test_a_mesh_that_does_not_divide_the_devices_is_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match="tensor"):
        r1jax.load_model(str(directory), mesh={"tensor": 3 * jax.device_count()})


def test_the_package_shows_these_names_and_loads_no_jax_for_a_reward() -> None:
    program = (
        "import sys, r1jax\n"
        f"assert dir(r1jax) == {NAMES}, dir(r1jax)\n"
        "assert r1jax.score(r'So \\\\boxed{0.5}.', r'\\\\frac12').reward == 1\n"
        "assert not {'jax', 'flax', 'transformers'} & sys.modules.keys()\n"
        "assert r1jax.__version__.count('.') == 2\n"
        "try: r1jax.scores\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'r1jax' has no attribute 'scores'\n"
