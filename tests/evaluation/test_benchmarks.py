"""Benchmarks by name: the paper's protocol, the columns of the real datasets, and tiny runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from livecodebench_rows import METHOD, PROGRAM
from tiny_checkpoint import make_model
from typer.testing import CliRunner

from r1jax.cli import app
from r1jax.config.load import ConfigError, dump_config, parse_config
from r1jax.config.run_config import RunConfig
from r1jax.data.examples import load_examples
from r1jax.data.prompts import Prompt
from r1jax.rewards import REWARDS, Outcome, RewardInput, RowScore, check_reward
from r1jax.rewards.choice import chosen
from r1jax.rewards.code import read_reference
from r1jax.rewards.sandbox import Isolation, SandboxError, strongest
from r1jax.rollouts import scored_samples
from r1jax.rollouts.sampling import Completion
from r1jax.sampler import Finish
from r1jax.settings.benchmarks import BENCHMARKS
from r1jax.settings.data import DataSection
from r1jax.settings.rewards import RewardSection
from r1jax.stages.evaluate.settings import EvaluateStage, evaluation_of

try:
    strongest(Isolation.NAMESPACES)
except SandboxError:
    ISOLATED = False
else:
    ISOLATED = True

# A row as each of the real datasets has it, and how a completion would end that is right.
ROWS: dict[str, dict[str, Any]] = {
    "aime_2024": {
        "id": 60,
        "problem": "Find $m+n$.",
        "solution": "The answer is 025.",
        "answer": "025",
        "url": "https://example.org",
        "year": "2024",
    },
    "aime_2025": {"id": "0", "problem": "Find the sum.", "answer": "70", "year": 2025},
    "math_500": {
        "problem": "What is half?",
        "solution": r"It is $\boxed{\frac12}$.",
        "answer": r"\frac{1}{2}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    "gpqa_diamond": {
        "Question": "Which has no mass?",
        "Correct Answer": "a photon\n",
        "Incorrect Answer 1": "an electron",
        "Incorrect Answer 2": "a proton",
        "Incorrect Answer 3": "a neutron",
        "Explanation": "It is light.",
        "High-level domain": "Physics",
        "Record ID": "rec0",
    },
    "gsm8k": {"question": "What is 40 + 2?", "answer": "<<40+2=42>>\n#### 42"},
    "livecodebench": PROGRAM,
}
RIGHT = {
    "aime_2024": r"\boxed{25}",
    "aime_2025": r"\boxed{70}",
    "math_500": r"\boxed{0.5}",
    "gsm8k": r"\boxed{42}",
    "livecodebench": "```python\nprint(sum(map(int, input().split())))\n```",
}
# recipe.md's table: the paper's k.
SAMPLES = {
    "aime_2024": 64,
    "aime_2025": 64,
    "math_500": 16,
    "gpqa_diamond": 64,
    "livecodebench": 8,
}


def config_of(name: str, path: Path, *overrides: str) -> RunConfig:
    rows = [ROWS[name]] if name != "livecodebench" else [PROGRAM, METHOD]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = json.dumps(evaluation_of("some/model", "model", [name]))
    return parse_config(text, "test", [f"data.{name}.source=jsonl:{path}", *overrides])


def test_every_benchmark_is_tried_here() -> None:
    assert set(ROWS) == set(BENCHMARKS) == {*SAMPLES, "gsm8k"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_protocol_is_the_papers(name: str) -> None:
    config = parse_config(json.dumps(evaluation_of("some/model", "model", [name])), "test")
    (stage,) = config.stages
    assert isinstance(stage, EvaluateStage)
    assert stage.samples_per_problem == SAMPLES.get(name, 4)
    assert (stage.sampling.temperature, stage.sampling.top_p) == (0.6, 0.95)
    assert (stage.sampling.top_k, stage.sampling.min_p, stage.sampling.stop) == (0, 0, [])
    assert stage.max_new_tokens == 32_768
    assert stage.problems is None
    (data,) = config.data.values()
    assert (data.template, data.system_prompt, data.limit) == ("chat", None, None)
    assert data.source is not None and data.source.startswith("hf:")
    if stage.rewards == {"accuracy": RewardSection()}:
        words = "Please reason step by step, and put your final answer within \\boxed{}."
        assert data.prompt_suffix.strip() == words


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_of_the_real_datasets_become_problems_with_a_reference(
    name: str, tmp_path: Path
) -> None:
    config = config_of(name, tmp_path / "rows.jsonl")
    (stage,) = config.stages
    assert isinstance(stage, EvaluateStage) and isinstance(stage.rewards, dict)
    ((reward, section),) = stage.rewards.items()
    if reward == "code" and not ISOLATED:
        pytest.skip("programs cannot be isolated here")
    check_reward(reward, section.options, config.verifier)
    for example in load_examples(config.data[name]):
        right, wrong = RIGHT.get(name, ""), r"\boxed{77}"
        if name == "gpqa_diamond":
            options = dict(line.split(") ") for line in example.prompt.split("\n")[2:])
            assert options[example.answer] == "a photon" and chosen(example.answer)
            right, wrong = f"\\boxed{{{example.answer}}}", "\\boxed{E}"
        if name == "livecodebench":
            wrong = "```python\nprint(3)\n```"
            if read_reference(example.answer).entry:
                program = "class Solution:\n  def add(self, xs, n):\n    return [x + n for x in xs]"
                right = f"```python\n{program}\n```"
        for text, outcome in ((right, Outcome.RIGHT), (wrong, Outcome.WRONG)):
            row = RewardInput(example.prompt, f"<think>So.</think>\n{text}", example.answer)
            assert REWARDS[reward].function(row, section.options).outcome == outcome


TWO = """\
name: two
model: {path: some/model}
data:
  train: {source: "task:running_total"}
  math_500: {limit: 50, prompt_suffix: ""}
  mine: {benchmark: gsm8k, source: "tfds:gsm8k"}
rewards: {format: {}}
stages:
  - {name: rl, kind: grpo, data: train, steps: 4, optimizer: {learning_rate: 1e-4}}
  - {name: aime, kind: evaluate, benchmark: aime_2024, weights: model}
  - {name: maths, kind: evaluate, benchmark: math_500, max_new_tokens: 9, rewards: [format]}
  - {name: school, kind: evaluate, benchmark: gsm8k, data: mine, samples_per_problem: 3}
"""


def test_what_the_config_says_itself_comes_first() -> None:
    config = parse_config(TWO, "two.yaml", ["data.aime_2024.limit=2"])
    aime, maths, school = config.stages[1:]
    assert isinstance(aime, EvaluateStage) and isinstance(maths, EvaluateStage)
    assert isinstance(school, EvaluateStage)
    assert (maths.max_new_tokens, maths.rewards, maths.samples_per_problem) == (9, ["format"], 16)
    assert (school.samples_per_problem, school.samples_per_batch) == (3, None)
    defined = DataSection.model_validate(BENCHMARKS["aime_2024"].data)
    assert config.data["aime_2024"] == defined.model_copy(
        update={"benchmark": "aime_2024", "limit": 2}
    )
    assert (config.data["math_500"].limit, config.data["math_500"].prompt_suffix) == (50, "")
    # A source of one's own has its own splits and options, but the benchmark's columns.
    mine, theirs = config.data["mine"], DataSection.model_validate(BENCHMARKS["gsm8k"].data)
    assert (mine.source, mine.split, mine.options) == ("tfds:gsm8k", "train", {})
    assert (mine.fields, mine.answer_pattern) == (theirs.fields, theirs.answer_pattern)


def test_one_option_set_leaves_the_others() -> None:
    text = json.dumps(evaluation_of("some/model", "model", ["livecodebench", "aime_2025"]))
    overrides = [
        "stages.livecodebench.rewards.code.options.minimum_isolation=limits",
        "data.aime_2025.options.revision=abc",
        "stages.aime_2025.sampling.top_p=1.0",
    ]
    config = parse_config(text, "test", overrides)
    code, aime = config.stages
    assert isinstance(code, EvaluateStage) and isinstance(aime, EvaluateStage)
    options = config.rewards_of(code)["code"].options
    assert options == {
        **BENCHMARKS["livecodebench"].reward_options,
        "minimum_isolation": "limits",
    }
    assert config.data["aime_2025"].options == {"config": "default", "revision": "abc"}
    assert (aime.sampling.temperature, aime.sampling.top_p) == (0.6, 1.0)


def test_a_benchmark_changes_nothing_for_other_stages() -> None:
    config = parse_config(TWO, "two.yaml")
    assert set(config.rewards) == {"format"}
    assert set(config.rewards_of(config.stages[0])) == {"format"}  # of `rl`
    assert config.rewards_of(config.stages[1]) == {"accuracy": RewardSection()}
    assert config.data["train"].benchmark is None


def test_the_resolved_config_says_it_all_and_reads_back() -> None:
    config = parse_config(TWO, "two.yaml")
    text = dump_config(config)
    assert "hf:HuggingFaceH4/aime_2024" in text and "samples_per_problem: 64" in text
    assert parse_config(text, "again") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.aime.benchmark=aime24",
            'stages.aime.benchmark = "aime24": no such benchmark; did',
        ),
        (
            "stages.aime.benchmark=3",
            "stages.aime.benchmark = 3: no such benchmark; there are aime_",
        ),
        ("data.mine.benchmark=gsm", 'data.mine.benchmark = "gsm": no such benchmark; did you mean'),
        ("stages.rl.benchmark=gsm8k", 'stages.rl.benchmark = "gsm8k": unknown key'),
        (
            "stages.aime.rewards={choise: {wight: 1}}",
            "stages.aime.rewards.choise.wight = 1: unknown",
        ),
        ("stages.aime.rewards={}", "stages.aime.rewards = {}: should be"),
        ("stages.aime.samples_per_batch=7", "samples_per_problem = 64 is not a multiple of"),
        (
            "stages.maths.rewards=[choice]",
            "stages.maths.rewards: 'choice' is not one of ['format']",
        ),
    ],
)
def test_mistakes_are_one_message_each(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(TWO, "two.yaml", [override])
    (problem,) = error.value.problems
    assert message in problem


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["evaluate"]),
        lambda below: (
            st.lists(below)
            | st.dictionaries(st.sampled_from(["name", "kind", "data", "benchmark", "x"]), below)
        ),
    )
)
def test_no_form_of_a_config_breaks_the_filling_in(anything: Any) -> None:
    document = {"name": "a", "model": {"path": "p"}, "stages": anything, "data": anything}
    try:
        parse_config(json.dumps(document), "any")
    except ConfigError:
        pass


def test_each_definition_keeps_within_its_verifier() -> None:
    """The deadline that `eval` sets is enough for every reward, memory too."""
    config = parse_config(json.dumps(evaluation_of("m", "m", list(BENCHMARKS))), "test")
    for stage in config.stages:
        assert isinstance(stage, EvaluateStage) and isinstance(stage.rewards, dict)
        for name, section in stage.rewards.items():
            REWARDS[name].check_section(section.options, config.verifier)


def longer(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose prompt has between 128 and 256 bytes, as those of LiveCodeBench: one shape."""
    (column,) = {"problem", "question", "Question"} & row.keys()
    return {**row, column: row[column].ljust(100, "?")}


def tiny_eval(folder: Path, names: Sequence[str], out: str, *more: str, part: int = 2) -> str:
    """What `r1jax eval` prints, with tiny rows in place of the hub's and a model of the test's."""
    if not (folder / "model").exists():
        make_model(folder / "model")
    command = ["eval", str(folder / "model"), "--out", str(folder / out), *more]
    command += ["verifier.workers=1", "model.log_prob_chunk=64"]
    for name in names:
        rows = [PROGRAM, METHOD, PROGRAM] if name == "livecodebench" else [longer(ROWS[name])] * 3
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command += ["--benchmark", name, f"data.{name}.source=jsonl:{path}"]
        command += [f"data.{name}.template=plain", f"stages.{name}.max_new_tokens=4"]
        command += [f"stages.{name}.samples_per_problem=4", f"stages.{name}.problems_per_batch=2"]
        command += [f"stages.{name}.samples_per_batch={part}"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_eval_of_a_directory_needs_no_config(tmp_path: Path) -> None:
    names = [name for name in BENCHMARKS if name != "livecodebench" or ISOLATED]
    shown = tiny_eval(tmp_path, names, "out", "--dry-run")
    assert "hf:" not in shown and "aime_2024: key-value cache" in shown
    assert not (tmp_path / "out").exists()

    # One of each kind of reward: maths, choice and code.
    names = [name for name in ("aime_2024", "gpqa_diamond", "livecodebench") if name in names]
    shown = tiny_eval(tmp_path, names, "out")
    run = tmp_path / "out" / "model-eval-s0"
    assert f"results: {run / 'results.json'}" in shown
    results = json.loads((run / "results.json").read_text())
    assert results["complete"] and set(results["versions"]) >= {"r1jax", "jax"}
    assert [each["stage"] for each in results["evaluations"]] == names
    assert results["config"]["data"][names[0]]["prompt_suffix"].startswith("\nPlease")
    for each in results["evaluations"]:
        assert (each["problems"], each["samples"]) == (3, 4)
        assert each["pass_at_1"]["low"] <= each["pass_at_1"]["value"] <= each["pass_at_1"]["high"]
        rows = samples_of(run, each["stage"])
        assert [(row["problem_id"], row["sample"]) for row in rows] == [
            (problem, sample) for problem in range(3) for sample in range(4)
        ]


def samples_of(run: Path, stage: str) -> list[dict[str, Any]]:
    (path,) = run.glob(f"stages/[0-9][0-9]-{stage}/samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_resumes_and_draws_the_same_in_parts_as_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored_samples, "QUEUE_BATCHES", 1)  # An evaluation resumes behind queues.
    tiny_eval(tmp_path, ["gsm8k"], "parts")
    run = tmp_path / "parts" / "model-eval-s0"
    path = run / "stages" / "00-gsm8k" / "samples.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    # A batch is two parts of two samples: the first one stays as it is, here with a mark, and the
    # second, which was cut, is drawn again.
    marked = b'{"mark": 1, ' + first[1:]
    path.write_bytes(marked + b"".join(others[:6]) + b'{"cut')
    record = json.loads((run / "run.json").read_text())
    record["stages"]["gsm8k"]["status"] = "running"
    (run / "run.json").write_text(json.dumps(record))
    tiny_eval(tmp_path, ["gsm8k"], "parts")
    assert path.read_bytes() == marked + b"".join(others)

    tiny_eval(tmp_path, ["gsm8k"], "once", part=4)
    at_once = samples_of(tmp_path / "once" / "model-eval-s0", "gsm8k")
    in_parts = samples_of(run, "gsm8k")
    assert in_parts[0].pop("mark") and in_parts == at_once
    assert len({row["completion"] for row in at_once}) > 4


def test_hidden_tests_of_megabytes_are_not_stored_with_every_sample() -> None:
    prompt = Prompt(0, "p", "", np.zeros(1, np.int32), "p", "x" * 10**6)
    sample = Completion(prompt, 0, np.zeros(2, np.int32), np.zeros(2), Finish.EOS, "t")
    assert sample.reward_input().answer == prompt.answer
    row = sample.row(RowScore(1.0, True), step=0)
    assert row["answer"] == "x" * 4000


def test_eval_takes_a_config_or_benchmarks_not_both(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["eval", "m", "--benchmark", "gsm8k", "--config", "tiny/r1_zero"]
    )
    assert result.exit_code == 2 and "without --config" in result.stderr
