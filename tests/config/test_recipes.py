"""The packaged configs say what the paper says, and read the rows that their hub datasets have."""

from __future__ import annotations

import re

import pytest

from r1jax.config.load import load_config
from r1jax.data.example import split_of
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.grpo.settings import GRPOStage

REAL = ["qwen2.5-1.5b/r1_zero_gsm8k", "qwen2.5-math-7b/r1_zero_math"]


def test_the_small_model_is_evaluated_on_problems_that_it_does_not_train_on() -> None:
    config = load_config("smollm2-135m/r1_zero")
    before, rl, after = config.stages
    assert isinstance(before, EvaluateStage) and isinstance(rl, GRPOStage)
    assert before.model_copy(update={"name": after.name}) == after and before.data == "held_out"
    train, held_out = config.data[str(rl.data)], config.data["held_out"]
    # Which rows are held out follows from the question's text and the fraction alone.
    changes = {"split": "held_out", "limit": held_out.limit}
    assert train.model_copy(update=changes) == held_out and train.held_out_fraction == 0.1
    # The examples end as samples do, and their sums are right.
    sums = re.findall(
        r"(\d+) ([+-]) (\d+) =\nAnswer: <think>.* = (\d+)</think> <answer>(\d+)<",
        train.prompt_prefix,
    )
    assert [int(a) + (1 if sign == "+" else -1) * int(b) for a, sign, b, *_ in sums] == [8, 35]
    assert all(thought == answer for *_, thought, answer in sums)
    questions = re.findall("Question: (State .*)", train.prompt_prefix)
    assert [split_of(question, train.held_out_fraction) for question in questions] == ["train"] * 2
    assert rl.sampling.stop == before.sampling.stop == ["</answer>"]


@pytest.mark.parametrize("name", REAL)
def test_settings_of_the_paper(name: str) -> None:
    config = load_config(name)
    before, rl, after = config.stages
    assert isinstance(rl, GRPOStage)
    assert isinstance(before, EvaluateStage) and isinstance(after, EvaluateStage)
    # arXiv 2501.12948: 32 questions x 16 outputs a step, 8,192 outputs a rollout phase.
    assert (rl.questions_per_step, rl.outputs_per_question) == (32, 16)
    assert rl.questions_per_step * rl.outputs_per_question * rl.mini_batches_per_rollout == 8192
    assert (rl.loss.kl_coefficient, rl.reference_refresh_every) == (0.001, 400)
    assert rl.sampling.temperature == 1.0
    assert (after.sampling.temperature, after.sampling.top_p) == (0.6, 0.95)
    # Before and after are comparable only if nothing but the weights differs.
    assert before.model_copy(update={"name": after.name}) == after
    assert config.rewards["accuracy"].weight == config.rewards["format"].weight
    assert rl.data != after.data


def test_gsm8k_answer() -> None:
    pattern = load_config(REAL[0]).data["train"].answer_pattern
    assert pattern is not None
    found = re.findall(pattern, "She has 2+3=<<2+3=5>>5 #1.\nThat makes 1,200.\n#### 1,200")
    assert found[-1] == "1,200"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so it is $\boxed{3}$.", "3"),
        (r"$\boxed{\frac{1}{\sqrt{2}}}$ as asked", r"\frac{1}{\sqrt{2}}"),
        (r"only $\boxed 7$.", "7"),
        (r"$\boxed{1}$, no: $\boxed{\$5.50}$", r"\$5.50"),
        (r"\boxed{\left\{ x : \{1\} \right\}}", r"\left\{ x : \{1\} \right\}"),
        (r"$\fbox{\text{a $x$ and {b{c}}}}$", r"\text{a $x$ and {b{c}}}"),
        ("\\boxed{\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}}", None),
    ],
)
def test_math_answer_is_the_last_box(solution: str, answer: str | None) -> None:
    pattern = load_config(REAL[1]).data["train"].answer_pattern
    assert pattern is not None
    expected = answer or "\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}"
    assert re.findall(pattern, solution)[-1] == expected
