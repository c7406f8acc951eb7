"""Labels of steps by rollouts, a process reward model of them, and RL that it rewards."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from deepseek_models import SIZES
from tiny_checkpoint import make_model

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.data.steps import cut_steps, step_ends
from r1jax.rewards.process import solution_score
from r1jax.run.resolve import check, load_functions, resolve
from r1jax.run.selection import Selection
from r1jax.settings.steps import StepRule
from r1jax.stages.step_labels.settings import StepLabelsStage
from r1jax.stages.step_labels.stage import step_label

TESTS = Path(__file__).parents[1]
CONFIG = str(TESTS / "tiny_process.yaml")
RULE = StepRule(separators=[" ", "=", "+", "-", "1", "2", "3", "4"])


def test_labels_by_hand() -> None:
    outcomes = ["right", "wrong", "unparseable", "verifier_failed"]
    assert step_label(outcomes, soft=True) == 1 / 3
    assert step_label(outcomes, soft=False) is True
    assert step_label(["wrong", "wrong"], soft=True) == 0
    assert step_label(["wrong", "verifier_failed"], soft=False) is False
    assert step_label(["verifier_failed"], soft=True) is None


def start(output: Path, point: str = "none", number: int = 0, *changes: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [str(TESTS / "killed_run.py"), point, str(number), CONFIG, f"output={output}"]
    done = forked.run(*command, *changes, env=environment, cwd=TESTS)
    expected = 0 if point == "none" else 143 if point.startswith("sigterm") else -9
    assert done.returncode == expected, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("process") / "whole"
    start(output)
    return output / "tiny-process-s0"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_labels_are_what_the_continuations_came_to(finished: Path) -> None:
    directory = finished / "stages" / "01-labels"
    solutions, written = rows(directory / "samples.jsonl"), rows(directory / "dataset.jsonl")
    assert tuple(written[0]) == StepLabelsStage.DESCRIPTION.dataset_columns
    continuations = iter(rows(directory / "continuations" / "samples.jsonl"))
    ended = [
        row
        for row in solutions
        if row["finish_reason"] != "length" and cut_steps(row["completion"], RULE)
    ]
    assert len(ended) == len(written) > 10
    for solution, row in zip(ended, written, strict=True):
        assert "".join(row["completions"]) == row["response"] == solution["completion"]
        assert row["completions"] == cut_steps(solution["completion"], RULE)
        before = ""
        for step, label in zip(row["completions"][:-1], row["labels"], strict=False):
            before += step
            four = list(islice(continuations, 4))
            assert {each["problem_id"] for each in four} == {solution["problem_id"]}
            # `even_digits` by hand, of the beginning and its continuation.
            whole = [before + each["completion"] for each in four]
            right = [sum(c.isdigit() for c in text) % 2 == 0 for text in whole]
            assert [each["outcome"] == "right" for each in four] == right
            assert label == sum(right) / 4
        assert row["labels"][-1] == (solution["outcome"] == "right")
    assert next(continuations, None) is None
    assert {label for row in written for label in row["labels"]} >= {0.25, 0.5, 0.75}
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["rows"] == summary["samples"]["kept"] == len(written)
    # Random numbers of a prompt's samples are numbered by solution, step and continuation.
    numbers = [
        (row["problem_id"], row["sample"])
        for row in rows(directory / "continuations" / "samples.jsonl")
    ]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.slow
def test_training_is_logged_with_held_out_accuracy_and_auc(finished: Path) -> None:
    metrics = rows(finished / "stages" / "02-prm" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["right"] <= 1 and row["loss"] > 0
    measured = [row for row in metrics if "held_out/auc" in row]
    assert [row["step"] for row in measured] == [2, 4]
    assert all(0 <= row["held_out/auc"] <= 1 for row in measured)


@pytest.mark.slow
def test_the_reward_in_rl_is_that_of_transformers_token_classification(finished: Path) -> None:
    import torch
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    directory = finished / "stages" / "02-prm" / "model"
    model = AutoModelForTokenClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    samples = rows(finished / "stages" / "03-rl" / "samples.jsonl")
    compared = 0
    for sample in samples:
        offsets = step_ends(sample["completion"], RULE)
        if not offsets:
            continue
        ids = tokenizer(sample["prompt"] + sample["completion"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        right = torch.softmax(logits, -1)[:, 1].tolist()
        lengths = [len(tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]
        ends = [
            next(n for n, length in enumerate(lengths) if length >= len(sample["prompt"]) + offset)
            for offset in offsets
        ]
        scores = [right[end] for end in ends]
        shown = [float(part) for part in sample["details"]["process"].split()]
        np.testing.assert_allclose(shown, scores, atol=6e-4)
        expected = solution_score(scores, "product")
        assert sample["parts"]["process"] == pytest.approx(expected, abs=1e-4)
        compared += 1
    assert compared > len(samples) / 2


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_bytes(finished: Path) -> None:
    killed = finished.parents[1] / "killed"
    # In the solutions, twice in the continuations, asked to stop there, in training, in RL.
    for point, number in (
        ("samples", 3),
        ("samples", 16),
        ("sigterm_in_judging", 4),
        ("log", 3),
        ("log", 3),
    ):
        start(killed, point, number)
    start(killed)
    whole = {path.relative_to(finished): path for path in finished.glob("stages/**/*")}
    compared = 0
    for name, path in whole.items():
        if path.suffix in (".jsonl", ".safetensors") and path.name != "timings.jsonl":
            again = killed / finished.name / name
            assert path.read_bytes() == again.read_bytes(), name
            compared += 1
    assert compared > 20


@pytest.mark.slow
def test_given_solutions_are_labelled_in_place_of_sampled_ones(finished: Path) -> None:
    output = finished.parents[1] / "given"
    labels = finished / "stages" / "01-labels" / "dataset.jsonl"
    start(
        output,
        "none",
        0,
        f"data.questions={{source: 'jsonl:{labels}', template: plain, limit: 5}}",
        "stages.labels.solutions=given",
        "stages.labels.label=hard",
        "data.labelled.held_out_fraction=0",
        "stages.prm.held_out=null",
        "stages.rl.steps=1",
        "stages.rl.rewards=[process]",
        "rewards.process.per_step=true",
    )
    written = rows(output / "tiny-process-s0" / "stages" / "01-labels" / "dataset.jsonl")
    assert [row["response"] for row in written] == [row["response"] for row in rows(labels)[:5]]
    assert {type(label) for row in written for label in row["labels"]} == {bool}
    # In RL the steps are rewarded, and nothing else.
    (metrics,) = rows(output / "tiny-process-s0" / "stages" / "03-rl" / "metrics.jsonl")
    assert metrics["optimizer/grad_norm"] > 1e-4 and metrics["optimizer/finite"] == 1
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/process"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["data.labelled.source=stage:base"],
            "comes from stage:base, which is not a stage before stages.prm that writes a dataset",
        ),
        (
            ["stages.after.data=labelled"],
            "comes from stage:labels, which writes step labels; stages.after reads responses",
        ),
        (["rewards.process.reads=response"], "a process reward model reads whole responses"),
        (["rewards.even.step_rule={separators: [x]}"], "belong to a process reward model"),
        (["stages.prm.step_rule={pattern: '('}"], "no regular expression"),
        (["stages.prm.step_rule.pattern='a'"], "give separators or pattern, not both"),
        (["stages.prm.solution_score=mean"], "stages.prm.solution_score"),
        (["stages.labels.name=prm2"], "comes from stage:labels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [
                "data.labelled.source=jsonl:tiny_labels.jsonl",
                "data.labelled.fields={labels: marks}",
            ],
            "'marks'",
        ),
        (
            ["stages.labels.solutions=given"],
            "data.questions.fields.response: train row 0 has no response, and stages.labels.solu",
        ),
        (
            ["stages.prm.data=mixed", "data.mixed={mixture: {labelled: 1, others: 1}}"],
            "data.mixed.mixture: stages.prm reads labelled steps, which come from one source",
        ),
        (
            ["rewards.process.step_rule={separators: [x]}"],
            "rewards.process.step_rule: that of stages.prm is used; remove it",
        ),
        (
            ["stages.after.chosen_by=[proces]"],
            "'proces' is no reward of this stage; did you mean 'process'?",
        ),
        (
            ["stages.labels.continuations=1000000", "stages.labels.max_new_tokens=4000"],
            "stages.labels.continuations = 1000000: solutions_per_prompt x",
        ),
    ],
)
def test_what_a_stage_could_not_use_is_refused_before_any_compute(
    changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS)
    with pytest.raises(ValueError) as caught:
        check(resolve(load_config(CONFIG, changes)))
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_file_of_prm800k_is_learnt_from_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(TESTS)

    def plan(file: Path) -> RunConfig:
        section = f"{{source: 'jsonl:{file}', template: plain}}"
        changes = ["weights=model", "step_rule={separators: [' ']}", "neutral=wrong", "steps=2"]
        changes = [f"stages.prm.{each}" for each in [*changes, "checkpoint_every=2"]]
        data = [f"data.labelled={section}", f"data.others={section}"]
        return load_config(CONFIG, [f"output={tmp_path}", *data, *changes])

    file = TESTS / "tiny_prm800k.jsonl"
    assert recipe.run(plan(file), Selection(only="prm")) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "11 of 13 labelled solutions" in said and "dropped: 2 without a label" in said, said
    (path,) = tmp_path.glob("*/stages/02-prm/metrics.jsonl")
    measured = rows(path)
    assert [row["step"] for row in measured] == [1, 2]
    assert measured[-1]["loss"] > 0 and 0 <= measured[-1]["held_out/auc"] <= 1
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(file.read_text().replace('"9-2=8", "rating": -1', '"9-2=8", "rating": 5'))
    with pytest.raises(ConfigError) as caught:
        check(resolve(plan(wrong)))
    assert "wrong.jsonl:2: label.steps, step 2: rating = 5; needs -1, 0 or 1" in str(caught.value)


def test_a_directory_that_is_no_process_reward_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TESTS)
    make_model(tmp_path)

    def problem_of(reward: str) -> str:
        changes = [f"rewards.process={reward}", "stages.rl.rewards=[even, process]"]
        with pytest.raises(ValueError) as caught:
            check(resolve(load_config(CONFIG, changes)))
        return str(caught.value)

    where = "command line: rewards.process.model = "
    rule = "step_rule: {separators: [x]}"
    found = problem_of(f"{{model: {tmp_path}, template: plain, {rule}}}")
    assert found.startswith(where)
    assert "its config.json is that of a language model, no token classification" in found
    assert "name a directory that process_reward_model stages" in found
    found = problem_of(f"{{model: {tmp_path}, template: plain}}")
    assert "a directory needs reads" in found and "step_rule" in found

    raw = json.loads((tmp_path / "config.json").read_text())
    labels = {"architectures": ["Qwen2ForTokenClassification"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **labels}))
    found = problem_of(f"{{model: {tmp_path}, template: plain, reads: response}}")
    assert found.startswith(where) and "is that of a process reward model, no sequence" in found
    assert "or give step_rule in place of reads" in found
    config = load_config(
        CONFIG, [f"rewards.process={{model: {tmp_path}, template: plain, {rule}}}"]
    )
    check(resolve(config))


def test_a_model_that_transformers_could_not_load_is_refused() -> None:
    import transformers

    assert not hasattr(transformers, "DeepseekV2ForTokenClassification")
    sizes = {key: v for key, v in SIZES.items() if key != "initializer_range"} | {"vocab_size": 20}
    shape = transformers.DeepseekV2Config(**sizes).to_dict()
    run = resolve(load_config(CONFIG, [f"model.config={json.dumps(shape)}"]))
    stage = run.config.stage("prm")
    with pytest.raises(ConfigError) as caught:
        load_functions(stage).check(stage, run)
    what = 'stages.prm.kind = "process_reward_model": transformers has no DeepseekV2ForToken'
    assert str(caught.value).startswith(f"{CONFIG}:") and what in str(caught.value)
