"""What is refused before any compute, and the rewards that end a run at its first batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.rollouts.scoring import check_first_rewards, is_scored
from r1jax.run.resolve import check, resolve
from r1jax.run.stop import RunError
from r1jax.settings.rewards import RewardSection

TINY = Path(__file__).parents[1] / "tiny.yaml"
REWARDS = """
def broken(row, options):
    raise KeyError("no such thing")

def nothing(completions, **columns):
    return [None] * len(completions)

def level(completions, level, **columns):
    return [float(each) for each in level]
"""


def rows(*answers: str, prompt: str = "1+1=") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "answer": answer, "level": i} for i, answer in enumerate(answers)]


def config(
    folder: Path, data: list[dict[str, Any]], rewards: dict[str, Any], **dataset: Any
) -> RunConfig:
    """Pretraining, then RL on the rows of a file; with a file of rewards beside the config."""
    plan = yaml.safe_load(TINY.read_text())
    base, _, zero = plan["stages"]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in data))
    plan["data"]["train"] = {"source": "task:running_total", "template": "plain", "limit": 50}
    plan["data"]["rows"] = {"source": f"jsonl:{source}", "template": "plain", **dataset}
    zero |= {"data": "rows", "steps": 2, "held_out": None}
    plan |= {"output": str(folder), "rewards": rewards, "stages": [base, zero]}
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "config.yaml").write_text(yaml.safe_dump(plan))
    return load_config(folder / "config.yaml")


def test_references_that_cannot_be_read_are_counted_with_their_lines(tmp_path: Path) -> None:
    data = [*rows(*["2"] * 38), *rows("\\frac{1}{", ""), *rows("4", prompt=" \u200b ")]
    few = config(tmp_path, data, {"accuracy": {}})
    with pytest.raises(ValueError) as refused:
        check(resolve(few))
    for text in (
        "data.rows: 3 of 41 rows have a blank prompt or a reference answer that cannot be read",
        f"{tmp_path}/rows.jsonl:39: reference answer '\\\\frac{{1}}{{': ",
        f"{tmp_path}/rows.jsonl:40: reference answer '': it is empty",
        f"{tmp_path}/rows.jsonl:41: its prompt is blank",
        "more than verifier.max_unreadable_share = 0.05",
    ):
        assert text in str(refused.value)
    verifier = few.verifier.model_copy(update={"max_unreadable_share": 0.08})
    (line,) = check(resolve(few.model_copy(update={"verifier": verifier})))
    assert line.startswith("data.rows: 3 of 41 rows")
    # Functions from outside may compare with another column.
    blank_alone = config(tmp_path, data[:40], {"my_rewards:level": {}})
    assert check(resolve(blank_alone)) == []
    choices = config(tmp_path, rows("A", "(b)", "12"), {"choice": {}})
    with pytest.raises(ValueError, match="1 of 3 rows .*\n.*'12': no choice: give a letter A to J"):
        check(resolve(choices))


def test_domains_decide_whose_references_are_read(tmp_path: Path) -> None:
    data = [{**row, "domain": "b"} for row in rows("12", "13")] + rows("A")
    choice_and_accuracy = {"choice": {"domains": [""]}, "accuracy": {"domains": ["b"]}}
    (line,) = check(resolve(config(tmp_path, data, choice_and_accuracy)))
    assert line.startswith("data.rows: 0 of 3 rows")


@pytest.mark.parametrize(
    ("rewards", "dataset", "message"),
    [
        ({"no_such_module:f": {}}, {}, "rewards.no_such_module:f: importing no_such_module failed"),
        ({"my_rewards.py:f": {}}, {}, "my_rewards.py has no function 'f'"),
        ({"mine": {"function": "other.py:f"}}, {}, "no file .*/other.py"),
        ({"my_rewards:level": {"options": {"a": 1}}}, {"max_prompt_tokens": 3}, "all 2 prompts"),
        ({"accuracy": {}}, {"template": "chat"}, "stages.zero: data.rows: .*no chat template"),
    ],
)
def test_mistakes_of_a_later_stage_are_found_before_the_first(
    tmp_path: Path, rewards: dict[str, Any], dataset: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(resolve(config(tmp_path, rows("1", "2"), rewards, **dataset)))


def test_weights_that_are_all_0_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stages.zero trains on nothing: .*accuracy, format, are"):
        config(tmp_path, rows("1"), {"accuracy": {"weight": 0.0}, "format": {"weight": 0.0}})


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (["my_rewards:nothing"], "none of the 16 samples .* gave None for all"),
        (["accuracy", "my_rewards.py:broken"], "failed on all 16 .*KeyError: 'no such thing'"),
    ],
)  # fmt: skip
def test_a_reward_that_fails_on_the_whole_first_batch_ends_the_run(
    tmp_path: Path, rewards: list[str], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        recipe.run(config(tmp_path, rows("1", "2", "3"), {name: {} for name in rewards}))


def test_a_reward_sees_the_columns_of_its_row(tmp_path: Path) -> None:
    run = config(tmp_path, rows("1", "2", "3"), {"my_rewards.py:level": {}, "accuracy": {}})
    assert recipe.run(run) == 0
    samples = (tmp_path / "tiny-s0/stages/01-zero/samples.jsonl").read_text().splitlines()
    for sample in map(json.loads, samples):
        assert sample["parts"]["my_rewards.py:level"] == int(sample["answer"]) - 1


def test_what_counts_as_a_first_batch_that_failed() -> None:
    def sample(**parts: float) -> dict[str, Any]:
        details = {name: "KeyError: 'x'" for name, value in parts.items() if math.isnan(value)}
        return {"parts": parts, "details": details}

    rewards = {"a": RewardSection(), "b": RewardSection(), "free": RewardSection(weight=0.0)}
    nan = math.nan
    assert is_scored(sample(a=1.0, free=nan), rewards)
    assert not is_scored(sample(a=1.0, b=nan), rewards) and not is_scored(sample(), rewards)
    check_first_rewards([sample(a=1.0, free=nan), sample(a=nan)], rewards)
    check_first_rewards([sample(a=1.0), sample()], rewards)
    with pytest.raises(RunError, match=r"rewards.b failed on all 1 samples.*KeyError: 'x'"):
        check_first_rewards([sample(a=1.0, b=nan), sample(a=1.0)], rewards)
    with pytest.raises(RunError, match="none of the 2 samples.*gave None for all of them"):
        check_first_rewards([sample(), sample()], rewards)
    row = {"parts": {"a": nan}, "details": {"a": "UnreadableReference: ?"}}
    check_first_rewards([row, sample(b=1.0)], rewards)
    with pytest.raises(RunError, match="none of the 1 samples.*rewards.a: UnreadableReference"):
        check_first_rewards([row], rewards)
