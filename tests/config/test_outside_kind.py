"""`kind: my_stages:Mine`: read, overridden and refused as the built-in kinds are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from r1jax.config.load import ConfigError, dump_config, parse_config
from r1jax.config.run_config import RunConfig
from r1jax.settings.kinds import describe_kind, load_kind

MODULE = """\
from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from r1jax.settings.sampling import SamplingSection
from r1jax.settings.stage import Stage, StageDescription
from r1jax.stages.grpo.settings import GRPOStage


class Mine(Stage):
    DESCRIPTION: ClassVar = StageDescription(title="mine", leaves="dataset")
    data: str
    strength: int = Field(ge=1)
    mode: Literal["soft", "hard"] = "soft"
    sampling: SamplingSection = SamplingSection(temperature=0.5, top_k=3)

    @model_validator(mode="after")
    def _consistent(self):
        if self.mode == "hard" and self.strength < 2:
            raise ValueError("mode = hard needs strength >= 2")
        return self

    def datasets(self):
        return [("data", self.data)]

    @classmethod
    def fill_in(cls, stage, data):
        if stage.get("data") != "implied":
            return {}
        if stage.get("strength") == 13:
            return {"strength": "no dataset is implied"}
        data.setdefault("implied", {"source": "task:running_total"})
        return {}


class Greedy(GRPOStage):
    greed: float = 0.5


class Undescribed(Stage):
    pass


def function():
    pass
"""

CONFIG = """\
name: small
model: {path: some/model}
data: {train: {source: "task:running_total"}}
rewards: {accuracy: {}}
stages:
  - name: mine
    kind: my_stages:Mine
    data: train
    strength: 3
  - {name: after, kind: evaluate, data: train}
"""


@pytest.fixture(autouse=True)
def my_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_stages.py").write_text(MODULE)
    (tmp_path / "my_broken_stages.py").write_text("import r1jax\nr1jax_ = jaxr\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_stages", raising=False)
    load_kind.cache_clear()


def problem_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "a.yaml", overrides)
    (problem,) = caught.value.problems
    return problem


def test_its_settings_are_read_and_written_with_their_kind() -> None:
    config = parse_config(CONFIG, "a.yaml")
    mine = config.stages[0]
    assert (mine.kind, mine.strength) == ("my_stages:Mine", 3)  # type: ignore[attr-defined]
    assert isinstance(mine, load_kind("my_stages:Mine"))
    assert parse_config(dump_config(config), "dump") == config
    assert RunConfig.model_validate(config.model_dump()) == config


def test_a_kind_may_extend_a_built_in_one() -> None:
    stage = "{name: rl, kind: my_stages:Greedy, data: train, steps: 4, greed: 1.0, optimizer: {}}"
    text = f"{CONFIG}  - {stage}\n"
    config = parse_config(text, "a.yaml", ["stages.rl.optimizer.learning_rate=1e-4"])
    greedy = config.stage("rl")
    assert (greedy.kind, greedy.greed) == ("my_stages:Greedy", 1.0)  # type: ignore[attr-defined]
    assert greedy.FUNCTIONS == "r1jax.stages.grpo.stage"


def test_an_override_in_a_section_that_is_left_out_keeps_its_other_defaults() -> None:
    mine = parse_config(CONFIG, "a.yaml", ["stages.mine.sampling.top_p=0.5"]).stages[0]
    sampling = mine.sampling  # type: ignore[attr-defined]
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 3, 0.5)


def test_what_it_implies_is_filled_in() -> None:
    config = parse_config(CONFIG, "a.yaml", ["stages.mine.data=implied"])
    assert config.data["implied"] == config.data["train"]
    assert problem_of(CONFIG, "stages.mine.data=implied", "stages.mine.strength=13") == (
        "command line: stages.mine.strength = 13: no dataset is implied"
    )


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "strength: 3",
            "strength: 3\n    mod: hard",
            '10: stages.mine.mod = "hard": unknown key; did you mean mode (soft or hard)?',
        ),
        (
            "strength: 3",
            "strength: 3\n    sampling: {temprature: 1}",
            "10: stages.mine.sampling.temprature = 1: unknown key; did you mean temperature "
            "(a number at least 0)?",
        ),
        (
            "    strength: 3\n",
            "",
            "6: stages.mine.strength is missing: should be an integer at least 1",
        ),
        (
            "strength: 3",
            "strength: three",
            '9: stages.mine.strength = "three": should be an integer at least 1',
        ),
        (
            "strength: 3",
            "strength: 1\n    mode: hard",
            "6: stages.mine: mode = hard needs strength >= 2",
        ),
        ("data: train\n    s", "data: trian\n    s", "8: stages.mine.data = 'trian': not one of"),
    ],
)
def test_a_mistake_in_its_settings(old: str, new: str, problem: str) -> None:
    assert CONFIG.count(old) == 1
    assert problem_of(CONFIG.replace(old, new)).startswith(f"a.yaml:{problem}")


def test_a_mistake_on_the_command_line() -> None:
    assert problem_of(CONFIG, "stages.mine.mode=hrad") == (
        'command line: stages.mine.mode = "hrad": should be soft or hard; did you mean hard?'
    )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "no_such_module:Mine",
            "importing no_such_module failed: ModuleNotFoundError: .*on PYTHONPATH",
        ),
        ("my_broken_stages:Mine", "importing my_broken_stages failed: NameError: .*'jaxr'"),
        (
            "my_stages:Mime",
            "my_stages has no class 'Mime' derived from r1jax.settings.stage.Stage",
        ),
        ("my_stages:function", "my_stages has no class 'function' derived from"),
        ("my_stages:Undescribed", "Undescribed has no DESCRIPTION"),
        ("my_stages", "should be pretrain, .*, or package.module:Class"),
        (":Mine", "importing  failed: ValueError"),
        ("evalute", "did you mean 'evaluate'"),
    ],
)
def test_a_kind_that_is_none_is_one_message(kind: str, reason: str) -> None:
    problem = problem_of(CONFIG.replace("my_stages:Mine", f'"{kind}"'))
    assert re.match(re.escape(f'a.yaml:7: stages.mine.kind = "{kind}": ') + f".*{reason}", problem)
    assert describe_kind(kind).title == kind.rpartition(":")[2]
