"""Anyone's function as a reward: its forms, what it is given, and where it is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from r1jax.rewards import Outcome, RewardInput, RowScore, Score, Verifier, VerifierError
from r1jax.rewards.functions import as_reward, load_reward
from r1jax.rewards.registry import sample_groups
from r1jax.settings.rewards import RewardSection, VerifierSection

ROW = RewardInput(
    prompt="<user>1+1?<assistant>",
    completion="<think>so</think>2",
    answer="2",
    question="1+1?",
    columns={"answer": "#### 2", "level": 3, "tags": ["sum"]},
    token_ids=[5, 6, 7],
    length=3,
    step=4,
    max_steps=9,
)


def one(function: Callable[..., object], options: dict[str, Any] | None = None) -> Score | None:
    return as_reward(function, "my:f", options or {}).function(ROW, options or {})


def test_a_row_and_options_a_number_or_none() -> None:
    assert one(lambda row, options: Score(0.5, Outcome.RIGHT, "x")) == Score(
        0.5, Outcome.RIGHT, "x"
    )
    assert one(lambda row, options: row.length / 10) == Score(0.3, Outcome.WRONG)
    assert one(lambda r, o: o["value"], {"value": 1}) == Score(1.0, Outcome.RIGHT)
    assert one(lambda row: row.columns["level"]) == Score(3.0, Outcome.RIGHT)
    assert one(lambda row, options: None) is None
    with pytest.raises(TypeError, match="returned str; needs a Score, a number or None"):
        one(lambda row, options: "good")


def test_fields_and_columns_by_name() -> None:
    def of_fields(completion: str, answer: str, level: int, weight: float = 2.0) -> float:
        return weight * level * completion.endswith(answer)  # the field, not the column

    assert one(of_fields) == Score(6.0, Outcome.RIGHT)
    assert one(of_fields, {"weight": 0.1}) == Score(pytest.approx(0.3), Outcome.WRONG)
    with pytest.raises(ValueError, match=r"rewards.my:f.options.wieght: .* no such parameter"):
        one(of_fields, {"wieght": 1})
    with pytest.raises(ValueError, match="'solution' is no column of the dataset; there are"):
        one(lambda completion, solution: 1.0)
    with pytest.raises(ValueError, match=r"parameters \['a', 'b', 'c'\] are of no form"):
        one(lambda a, b, c: 1.0)


def test_names_that_could_be_meant_otherwise_are_refused() -> None:
    def of_verl(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
    ) -> Any:
        return 1.0

    def annotated(thing: str, more: dict[str, Any]) -> float:
        return 1.0

    def typed(r: RewardInput, more: dict[str, Any]) -> float:
        return more["x"] * r.completion.endswith("2")

    # A field or an option behind another name: all are names of fields and columns.
    assert one(lambda level, completion: level + len(completion)) == Score(21.0, Outcome.RIGHT)
    assert one(lambda level, most: most - level, {"most": 4}) == Score(1.0, Outcome.RIGHT)
    assert one(typed, {"x": 3}) == Score(3.0, Outcome.RIGHT)
    assert one(lambda sample, cfg: cfg["x"], {"x": 3}) == Score(3.0, Outcome.RIGHT)
    for function, hint in (
        (
            of_verl,
            "data_source is domain here; solution_str is completion here; ground_truth is an",
        ),
        (
            lambda solution_str, ground_truth: 1.0,
            "solution_str is completion here; ground_truth is",
        ),
        (lambda text: 1.0, "text is completion here"),
        (lambda row, level: 1.0, "fields: "),
        (lambda sample, strict=True: 1.0, "fields: "),
        (lambda a, b: 1.0, "fields: "),
        (annotated, "fields: "),
    ):
        with pytest.raises(ValueError, match=rf"my:f: the function's parameters .*{hint}"):
            one(function)


def test_the_form_of_trl() -> None:
    def check(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any, **columns: Any
    ) -> Any:
        assert (prompts, completions) == (["1+1?"], ["<think>so</think>2"])
        assert (completion_ids, answer) == ([[5, 6, 7]], ["#### 2"])
        assert columns["level"] == [3] and columns["tags"] == [["sum"]]
        state = columns["trainer_state"]
        assert (state.global_step, state.max_steps) == (4, 9)
        columns["log_metric"]("mine", 1.0)
        return [0.25]

    assert one(check) == Score(0.25, Outcome.WRONG)
    assert one(lambda completions, **kw: [None]) is None
    assert one(lambda completion_ids, **kw: [len(completion_ids[0])]) == Score(3.0, Outcome.RIGHT)

    async def later(completions: list[str], level: list[int], **columns: Any) -> list[float]:
        return [float(each) for each in level]

    assert one(later) == Score(3.0, Outcome.RIGHT)
    with pytest.raises(ValueError, match="returned 2 rewards for 1 completions"):
        one(lambda completions, **kw: [1, 2])
    with pytest.raises(TypeError, match="returned float, not a list"):
        one(lambda completions, **kw: 1.0)


def test_messages_where_the_dataset_the_annotation_or_the_function_wants_them() -> None:
    def annotated(completions: list[list[dict[str, str]]], prompts: Any, **kw: Any) -> list[float]:
        assert prompts == [[{"role": "user", "content": "1+1?"}]]
        return [float(each[0]["content"][-1]) for each in completions]

    assert one(annotated) == Score(2.0, Outcome.RIGHT)
    # It says nothing; a text has no "content", so that messages are tried.
    assert one(
        lambda completions, **kw: [float(c[0]["content"][-1]) for c in completions]
    ) == Score(2.0, Outcome.RIGHT)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    row = RewardInput("p", "2", "2", columns={"prompt": messages})

    def conversational(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        assert prompts == [messages]
        assert completions == [[{"role": "assistant", "content": "2"}]]
        return [1.0]

    entry = as_reward(conversational, "my:f", {})
    assert entry.function(row, {}) == Score(1.0, Outcome.RIGHT)
    with pytest.raises(KeyError, match="nothing"):  # the first error, not the second form's
        one(lambda completions, **kw: {}["nothing"])


def test_samples_of_a_prompt_are_a_group_of_at_most_64() -> None:
    rows = [RewardInput(prompt, "", "") for prompt in "aabcc"]
    assert list(sample_groups(rows)) == [range(0, 2), range(2, 3), range(3, 5)]
    assert [len(g) for g in sample_groups([ROW] * 150)] == [64, 64, 22]
    assert list(sample_groups([])) == []


MODULE = """
import my_helper

def share(completions, **columns):
    longest = max(map(len, completions))
    return [len(each) / longest for each in completions]

def slow_share(completions, **columns):
    import time
    if "slow" in completions:
        time.sleep(600)
    return share(completions)

def some(row, options):
    return None if row.completion == "nothing" else 0.5

def broken(completions, **columns):
    raise KeyError("column")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_helper.py").write_text("")
    return tmp_path


def scored(folder: Path, names: Sequence[str], completions: str, **limits: Any) -> list[RowScore]:
    """Rows of prompt and completion, `p:abc q:ab`, scored in workers."""
    rows = [RewardInput(*each.split(":"), "") for each in completions.split()]
    section = VerifierSection(**{"workers": 2, "deadline_seconds": 1.0, **limits})
    rewards = {name: RewardSection() for name in names}
    with Verifier(rewards, section, str(folder)) as verifier:
        return verifier.submit(rows).result()


@pytest.mark.parametrize("module", ["my_rewards", "my_rewards.py"])
def test_a_file_beside_the_config_sees_all_samples_of_a_prompt(folder: Path, module: str) -> None:
    names = [f"{module}:share", f"{module}:some"]
    rows = scored(folder, names, "p:abcd p:ab p:a q:ab q:a", tasks_per_worker=1)
    assert [row.reward for row in rows] == [1.5, 1.0, 0.75, 1.5, 1.0]


def test_none_leaves_the_other_rewards_and_nothing_alone_is_unscored(folder: Path) -> None:
    both = scored(folder, ["my_rewards:some", "my_rewards:share"], "p:nothing q:ab")
    assert [(row.reward, row.scored, len(row.parts)) for row in both] == [
        (1.0, True, 1),
        (1.5, True, 2),
    ]
    (alone,) = scored(folder, ["my_rewards:some"], "p:nothing")
    assert math.isnan(alone.reward) and not alone.scored and alone.parts == {}


def test_a_group_that_hangs_or_raises_spoils_no_other(folder: Path) -> None:
    rows = scored(folder, ["my_rewards:slow_share"], "p:slow p:a q:ab q:a")
    assert [row.scored for row in rows] == [False, False, True, True]
    assert [row.reward for row in rows[2:]] == [1.0, 0.5]
    assert "no answer in 1 s" in str(rows[0].parts["my_rewards:slow_share"].detail)
    (row,) = scored(folder, ["my_rewards:broken"], "p:a")
    assert row.parts["my_rewards:broken"].detail == "KeyError: 'column'"


def test_what_cannot_be_found_is_named_with_its_folder(folder: Path) -> None:
    with pytest.raises(VerifierError, match=rf"no file {folder}/other.py; is it in {folder}"):
        scored(folder, ["other.py:f"], "p:a")
    with pytest.raises(VerifierError, match="my_rewards.py has no function 'nope'"):
        scored(folder, ["my_rewards.py:nope"], "p:a")
    with pytest.raises(ValueError, match="neither package.module:function nor file.py:function"):
        load_reward("my rewards:f", {})
