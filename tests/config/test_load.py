"""Reading configs: what is accepted, and what each mistake is answered with."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from r1jax.config.load import (
    ConfigError,
    dump_config,
    find_config,
    load_config,
    parse_config,
    slices_of,
)
from r1jax.config.other_names import OTHER_NAMES
from r1jax.config.packaged import packaged_configs, packaged_meshes
from r1jax.config.run_config import RunConfig
from r1jax.run.chips import CHIPS
from r1jax.settings.data import DataSection
from r1jax.settings.distillation import OnPolicyDistillation
from r1jax.settings.kinds import KINDS as KINDS_OF_STAGES
from r1jax.settings.kinds import load_kind
from r1jax.settings.mesh import MeshSection, RolloutMesh
from r1jax.settings.model import ModelSection
from r1jax.settings.objective import GRPOConfig, ObjectiveSettings
from r1jax.settings.optimizer import OptimizerSection
from r1jax.settings.rewards import RewardSection
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.grpo.settings import DynamicSampling, GRPOStage

# Line numbers in the tests count from 1 at `name`.
GOOD = """\
name: small
model:
  config: {rope_theta: 1e4, layers: 010, note: no, at: 12:30, vocabulary: 10_000, mask: 0xff}
  tokenizer: characters:running_total
data:
  train: {source: "task:running_total"}
rewards: {accuracy: {weight: 1}}
stages:
  - name: rl
    kind: grpo
    data: train
    steps: 4
    optimizer: {learning_rate: 1e-4}
  - name: after
    kind: evaluate
    data: train
"""


KINDS = (
    "pretrain, sft, grpo, rejection_sampling, reward_model, step_labels, process_reward_model, "
    "evaluate, or package.module:Class"
)


def problems_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "a.yaml", overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def problem_of(text: str, *overrides: str) -> str:
    (problem,) = problems_of(text, *overrides)
    return problem


def replaced(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def rl(text: str = GOOD, *overrides: str) -> GRPOStage:
    stage = parse_config(text, "a.yaml", overrides).stages[0]
    assert isinstance(stage, GRPOStage)
    return stage


def test_scalars_are_read_by_yaml_1_2() -> None:
    config = parse_config(GOOD, "a.yaml")
    assert config.model.config == {
        "rope_theta": 10_000.0,
        "layers": 10,
        "note": "no",
        "at": "12:30",
        "vocabulary": 10_000,
        "mask": 255,
    }
    assert rl().optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("2E3", 2e3), ("+.5", 0.5), ("1.", 1.0), ("6.02e+23", 6.02e23), ("3", 3.0)],
)
def test_every_spelling_of_a_number(text: str, number: float) -> None:
    assert rl(GOOD, f"stages.rl.optimizer.learning_rate={text}").optimizer.learning_rate == number


def test_the_steps_that_are_measured_are_a_config() -> None:
    config = load_config(Path(__file__).parents[2] / "benchmarks/grpo_step.yaml")
    (stage,) = config.stages
    assert isinstance(stage, GRPOStage)
    assert (stage.questions_per_step, stage.outputs_per_question) == (32, 16)
    assert stage.max_new_tokens == 512 and config.model.remat == "auto"


def test_dumped_config_reads_back_equal() -> None:
    text = replaced("name: small", 'name: small\ntitle: "1e-4"\nnotes: "two\\n  lines: # and\\n"')
    config = parse_config(text, "a.yaml", ["stages.rl.optimizer.epsilon=1e-30"])
    assert config.title == "1e-4"
    dumped = dump_config(config)
    assert parse_config(dumped, "dump") == config
    assert "notes: |" in dumped


def test_dumped_mixture_reads_back_equal() -> None:
    mixed = GOOD.replace("data:\n", "data:\n  both: {mixture: {train: 2}}\n")
    config = parse_config(mixed, "c.yaml")
    assert parse_config(dump_config(config), "d.yaml") == config
    with pytest.raises(ConfigError, match="limit has no effect on a mixture"):
        parse_config(mixed.replace("{train: 2}", "{train: 2}, limit: 5"), "c.yaml")


# --- Wrong files ---------------------------------------------------------------------------------


def test_unknown_key_names_file_line_path_value_and_nearest() -> None:
    assert problem_of(replaced("    steps: 4", "    steps: 4\n    questions_per_stp: 8")) == (
        "a.yaml:13: stages.rl.questions_per_stp = 8: unknown key; "
        "did you mean questions_per_step (an integer at least 1)?"
    )


def test_unknown_key_of_a_plain_dataclass_is_found() -> None:
    # pydantic ignores extra keys in a standard-library dataclass.
    problem = problem_of(replaced("    steps: 4", "    steps: 4\n    loss: {clip_lw: 0.1}"))
    assert problem.startswith("a.yaml:13: stages.rl.loss.clip_lw = 0.1: unknown key; did you mean")
    assert "clip_low" in problem


@pytest.mark.parametrize("directory", ["s3://bucket/programs", "gs://", "gs:///", "''"])
def test_a_compilation_cache_that_jax_cannot_open(directory: str) -> None:
    problem = problem_of(GOOD, f"compilation_cache={directory}")
    value = directory.strip("'")
    assert (
        "compilation_cache" in problem
        and f"{value!r} is no directory" in problem
        and "gs://BUCKET/FOLDER" in problem
    )
    for known in ("auto", "null", "gs://bucket/programs", "/tmp/programs"):
        parse_config(GOOD, "a.yaml", [f"compilation_cache={known}"])


def test_right_key_at_the_wrong_depth() -> None:
    problem = problem_of(replaced("    steps: 4", "    steps: 4\n    max_grad_norm: 2.0"))
    assert problem.endswith("did you mean optimizer.max_grad_norm (a number above 0)?")


def test_key_like_nothing_known_lists_what_is() -> None:
    problem = problem_of(
        replaced("rewards: {accuracy: {weight: 1}}", "rewards: {accuracy: {q: 1}}")
    )
    assert (
        problem == "a.yaml:7: rewards.accuracy.q = 1: unknown key; "
        "known here: weight, function, model, reads, template, step_rule, solution_score, "
        "per_step, domains, options"
    )


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("steps: 4", 'steps: "4"', '12: stages.rl.steps = "4": should be an integer at least 1'),
        ("steps: 4", "steps: 4.0", "12: stages.rl.steps = 4.0: should be an integer at least 1"),
        ("steps: 4", "steps: true", "12: stages.rl.steps = true: should be an integer at least 1"),
        ("steps: 4", "steps:", "12: stages.rl.steps = null: should be an integer at least 1"),
        ("steps: 4", "steps: 0", "12: stages.rl.steps = 0: should be greater than or equal to 1"),
        ("weight: 1", "weight: one", '7: rewards.accuracy.weight = "one": should be a number'),
        ("name: small", "name: 5", "1: name = 5: should be text"),
        (
            "data: train\n    steps",
            "data: 7\n    steps",
            "11: stages.rl.data = 7: should be text or a list (each a section with step, data)",
        ),
        (
            "data: train\n    steps",
            "data: [a]\n    steps",
            '11: stages.rl.data.0 = "a": should be a section with step, data',
        ),
        (
            "kind: grpo",
            "kind: gpro",
            f"10: stages.rl.kind = \"gpro\": did you mean 'grpo'? should be {KINDS}",
        ),
        (
            "    kind: grpo\n",
            "",
            f"9: stages.rl.kind is missing: should be {KINDS}",
        ),
        ("    steps: 4\n", "", "9: stages.rl.steps is missing: should be an integer at least 1"),
        (
            "learning_rate: 1e-4",
            "learning_rate: 1e-4, schedule: cosin",
            '13: stages.rl.optimizer.schedule = "cosin": should be constant or cosine or linear; '
            "did you mean cosine?",
        ),
        (
            "steps: 4",
            "steps: 4\n    max_new_tokens: some",
            '13: stages.rl.max_new_tokens = "some": should be an integer or a list '
            "(each a section with step, tokens)",
        ),
        (
            "steps: 4",
            "steps: 4\n    max_new_tokens: [{step: x, tokens: 2}]",
            '13: stages.rl.max_new_tokens.0.step = "x": should be an integer at least 0',
        ),
        (
            "steps: 4",
            "steps: 4\n    reference_refresh_every: 4.5",
            "13: stages.rl.reference_refresh_every = 4.5: should be an integer at least 1 or null",
        ),
        ("accuracy: {weight: 1}", "1: {}", "7: the key 1 is not text: put it in quotes"),
    ],
)
def test_ill_typed_value(old: str, new: str, expected: str) -> None:
    assert problem_of(replaced(old, new)) == f"a.yaml:{expected}"


def test_rules_between_keys_are_checked() -> None:
    problem = problem_of(replaced("steps: 4", "steps: 4\n    mini_batches_per_rollout: 3"))
    assert problem == (
        "a.yaml:9: stages.rl: steps = 4 is not a multiple of mini_batches_per_rollout = 3; change "
        "one of the two, such as mini_batches_per_rollout=2 or steps=6"
    )
    problem = problem_of(replaced("data: train\n    steps", "data: trian\n    steps"))
    assert problem == "a.yaml:11: stages.rl.data = 'trian': not one of the datasets ['train']"


def test_all_problems_are_reported_at_once() -> None:
    text = replaced("name: small", "name: small\nname: small\nsead: 1").replace(
        "steps: 4", "steps: x"
    )
    found = problems_of(text, "nonsense", "stages.zz.steps=1", "seed=-1")
    assert len(found) == 6
    for part in ("given twice", "seed (an integer", 'steps = "x"', "nonsense", "'zz'", "seed = -1"):
        assert sum(part in problem for problem in found) == 1, part


def test_repeated_key_is_refused() -> None:
    problem = problem_of(replaced("    steps: 4", "    steps: 4\n    steps: 5"))
    assert problem == "a.yaml:13: stages.0.steps is given twice, first in line 12"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a.yaml: should be a mapping of keys, not null"),
        ("- 1\n", "a.yaml: should be a mapping of keys, not [1]"),
        ("a: 1\nb: [\n", "a.yaml:3: not valid YAML"),
        ("a: 1\n  b: 2\n", "a.yaml:2: not valid YAML"),
        ("a: &x [*x]\n", "a.yaml:1: a.0 contains itself"),
        ("a: !!binary aGk=\n", "a.yaml:1: not valid YAML"),
        ("a: !!timestamp x\n", "a.yaml:1: not valid YAML: a value does not fit its tag"),
        ("a: !!bool maybe\n", "a.yaml:1: not valid YAML: a value does not fit its tag"),
        ("a: 1\nb: !!int c\n", "a.yaml:2: not valid YAML"),
        ("a: 1\nb:\n  - !!bool maybe\n", "a.yaml:3: not valid YAML: a value does not fit its tag"),
        ("a: 1\nb: 2\nc: d\a\n", "a.yaml:3: not valid YAML"),
        (f"base: {'x' * 5000}\n", "a.yaml:1: base: xxxxx"),
        ("a: !!python/object/apply:os.getcwd []\n", "a.yaml:1: not valid YAML"),
        ("? [x, y]\n: 1\n", "a.yaml:1: the key"),
    ],
)
def test_unreadable_file(text: str, expected: str) -> None:
    assert problem_of(text).startswith(expected)


def test_binary_file_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "a.yaml")


# --- Overrides -----------------------------------------------------------------------------------


def test_overrides_by_stage_name_by_index_and_in_order() -> None:
    stage = rl(GOOD, "stages.rl.steps=5", "stages.0.questions_per_step=8", "stages.rl.steps=6")
    assert (stage.steps, stage.questions_per_step) == (6, 8)


def test_override_value_is_yaml() -> None:
    stage = rl(GOOD, "stages.rl.max_new_tokens=[{step: 0, tokens: 8}, {step: 2, tokens: 16}]")
    assert isinstance(stage.max_new_tokens, list)
    assert [change.tokens for change in stage.max_new_tokens] == [8, 16]
    stage = rl(GOOD, "stages.rl.reference_refresh_every=null", "stages.rl.sampling.stop=[a=b]")
    assert stage.reference_refresh_every is None
    assert stage.sampling.stop == ["a=b"]


def test_override_in_an_absent_section_keeps_its_other_defaults() -> None:
    config = parse_config(GOOD, "a.yaml", ["mesh.axes.tensor=2", "stages.after.sampling.top_p=0.5"])
    assert config.mesh.axes == {"data": 1, "fsdp": -1, "tensor": 2}
    evaluation = config.stages[1]
    assert isinstance(evaluation, EvaluateStage)
    # An evaluate stage samples at 0.6, not at SamplingSection's 1.0.
    assert (evaluation.sampling.temperature, evaluation.sampling.top_p) == (0.6, 0.5)
    # The default itself must not have been changed.
    config = parse_config(GOOD, "a.yaml", ["mesh.axes.data=4"])
    assert config.mesh.axes == {"data": 4, "fsdp": -1, "tensor": 1}


def test_override_of_a_key_with_dots() -> None:
    text = replaced("accuracy: {weight: 1}", '"mine.rewards:exact": {weight: 1}')
    config = parse_config(text, "a.yaml", ["rewards.mine.rewards:exact.weight=2"])
    assert config.rewards["mine.rewards:exact"].weight == 2


def test_override_of_one_use_of_an_alias_leaves_the_other() -> None:
    text = replaced('{source: "task:running_total"}', '&d {source: "task:a"}\n  more: *d')
    config = parse_config(text, "a.yaml", ["data.more.source=task:b"])
    assert [section.source for section in config.data.values()] == ["task:a", "task:b"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "command line, steps: should be key.path=value"),
        ("=5", "command line, =5: should be key.path=value"),
        ("a..b=5", "command line, a..b=5: should be key.path=value"),
        ("seed=[", "command line, seed=[: not valid YAML"),
        ("model.config={a: 1, a: 2}", "command line, model.config={a: 1, a: 2}: a is given twice"),
        ("name.x=1", 'command line, name.x=1: name = "small" has no keys below it'),
        ("stages.rk.steps=1", "'rk'; did you mean rl?"),
        ("stages.2.steps=1", "stages has 2 entries and none is '2'; it has rl, after"),
        ("seed=x", 'command line: seed = "x": should be an integer at least 0'),
        ("stages.rl.optimizer=3", "command line: stages.rl.optimizer = 3: should be a section"),
        ("sede=1", "command line: sede = 1: unknown key; did you mean seed (an integer at"),
        ("modle.path=x", 'command line: modle = {"path": "x"}: unknown key; did you mean model'),
        ("stages.rl.optimizer.beta9=1", "command line: stages.rl.optimizer.beta9 = 1: unknown"),
    ],
)
def test_wrong_override_is_blamed_on_the_command_line(override: str, expected: str) -> None:
    problem = problem_of(GOOD, override)
    assert problem.startswith("command line")
    assert expected in problem


def test_file_is_not_blamed_for_an_override_that_breaks_a_rule() -> None:
    problem = problem_of(GOOD, "stages.rl.mini_batches_per_rollout=3")
    assert problem.startswith("a.yaml:9: stages.rl: steps = 4 is not a multiple of")
    assert problem.endswith("(with stages.rl.mini_batches_per_rollout=3 from the command line)")


def test_override_mends_the_file() -> None:
    assert rl(replaced("steps: 4", "steps: x"), "stages.rl.steps=4").steps == 4


# --- Finding and packaged configs ----------------------------------------------------------------


def test_a_file_goes_before_a_packaged_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = next(iter(packaged_configs()))
    assert find_config(name) == find_config(f"{name}.yaml") == packaged_configs()[name]
    monkeypatch.chdir(tmp_path)
    mine = Path(f"{name}.yaml")
    mine.parent.mkdir()
    mine.write_text(GOOD)
    assert find_config(f"{name}.yaml") == mine
    # Without the ending there is no such file; the packaged one is meant.
    assert find_config(name) == packaged_configs()[name]


@pytest.mark.parametrize(
    "name", ["qwen2.5-1.5b/r1_zero_gsmk8", "r1_zero_gsm8k", "qwen2.5-1.5b/r1_zero_gsmk.yaml"]
)
def test_unknown_config_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean.* qwen2.5-1.5b/r1_zero_gsm8k"):
        find_config(name)


def test_unknown_config_like_none_lists_all() -> None:
    with pytest.raises(ConfigError, match="packaged: .*qwen2.5-math-7b/r1_zero_math"):
        find_config("zzzz")


def test_the_three_configs_of_the_readme_are_packaged() -> None:
    assert {
        "tiny/r1_zero",
        "qwen2.5-1.5b/r1_zero_gsm8k",
        "qwen2.5-math-7b/r1_zero_math",
    } <= set(packaged_configs())


@pytest.mark.parametrize("name", packaged_meshes())
def test_every_mesh_can_be_named(name: str) -> None:
    mesh = parse_config(GOOD, "a.yaml", [f"mesh={name}"]).mesh
    assert mesh == MeshSection.model_validate(yaml.safe_load(packaged_meshes()[name].read_text()))


def test_a_named_mesh_may_be_overridden_in_part() -> None:
    config = parse_config(GOOD, "a.yaml", ["mesh=rollout_tensor4", "mesh.rollout.axes.tensor=8"])
    assert config.mesh.axes == {"fsdp": -1}
    assert config.mesh.rollout is not None
    assert config.mesh.rollout.axes == {"data": -1, "tensor": 8}


def test_an_unknown_mesh_is_told_with_its_place_and_the_nearest() -> None:
    near = "mesh=fsdq: mesh = 'fsdq': no such mesh; did you mean fsdp\\?"
    with pytest.raises(ConfigError, match=f"command line, {near}"):
        parse_config(GOOD, "a.yaml", ["mesh=fsdq"])
    known = r"a.yaml:\d+: mesh = 'elsewhere': no such mesh; there are fsdp, .*two_slices"
    with pytest.raises(ConfigError, match=known):
        parse_config(f"{GOOD}mesh: elsewhere\n", "a.yaml")


# --- On a base, and for a slice ------------------------------------------------------------------

CHILD = """\
base: base.yaml
name: child
stages.rl.steps: 8
rewards: {format: {weight: 2}}
slices:
  v5e:2x2: {mesh.axes: {fsdp: 4}, stages.rl.micro_batches: 2}
  v5p:2x2x2:
    mesh: fsdp
    stages.rl.steps: 16
"""


def on_base(folder: Path, child: str, base: str = GOOD) -> Path:
    (folder / "base.yaml").write_text(base)
    (folder / "child.yaml").write_text(child)
    return folder / "child.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # bases are found as configs are: from the working directory
    return tmp_path


def test_a_file_on_a_base_sets_keys_as_the_command_line_does(folder: Path) -> None:
    child = on_base(folder, CHILD)
    as_overrides = ["name=child", "stages.rl.steps=8", "rewards={format: {weight: 2}}"]
    assert load_config(child) == parse_config(GOOD, "a.yaml", as_overrides)
    # A file on a file on a base; the nearest has the last word, but for the command line.
    (folder / "grandchild.yaml").write_text("base: child.yaml\nstages.rl.steps: 12\n")
    grandchild = load_config("grandchild.yaml", ["seed=3"])
    steps = grandchild.stages[0].steps  # type: ignore[union-attr]
    assert (grandchild.name, steps, grandchild.seed) == ("child", 12, 3)
    assert slices_of("grandchild.yaml") == ["v5e:2x2", "v5p:2x2x2"]


def test_a_slice_comes_between_the_file_and_the_command_line(folder: Path) -> None:
    child = on_base(folder, CHILD)
    config = load_config(child, ["stages.rl.micro_batches=4"], "v5e:2x2")
    assert config.mesh.axes == {"fsdp": 4}
    assert config.stages[0].micro_batches == 4  # type: ignore[union-attr]
    other = load_config(child, (), "v5p:2x2x2")
    assert other.mesh == MeshSection(axes={"fsdp": -1})
    assert other.stages[0].steps == 16  # type: ignore[union-attr]
    with pytest.raises(
        ConfigError, match="no settings for the slice v4:2x2x2; it has settings for "
    ):
        load_config(child, (), "v4:2x2x2")
    with pytest.raises(ConfigError, match="it has no slices"):
        parse_config(GOOD, "a.yaml", (), "v5e:2x2")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "stages.rl.steps: 8",
            "stages.rl.steps: x",
            'child.yaml:3: stages.rl.steps = "x": should be',
        ),
        ("rl.steps: 8", "rk.steps: 8", "child.yaml:3, stages.rk.steps=8: stages has 2 entries"),
        (
            "name: child",
            "nam: child",
            'child.yaml:2: nam = "child": unknown key; did you mean name',
        ),
        ("base: base.yaml", "base: bade.yaml", "child.yaml:1: base: bade.yaml: neither a file nor"),
        ("base: base.yaml", "base: child.yaml", "is based on this file itself"),
        ("mesh.axes: {fsdp: 4}", "mesh.axis: 1", "child.yaml:6: mesh.axis = 1: unknown key"),
        ("mesh: fsdp", "mesh: fsdq", "child.yaml:8, mesh="),
    ],
)
def test_a_wrong_setting_is_told_with_its_own_file_and_line(
    folder: Path, old: str, new: str, expected: str
) -> None:
    assert CHILD.count(old) == 1
    child = on_base(folder, CHILD.replace(old, new))
    slice_name = "v5e:2x2" if "axis" in new else "v5p:2x2x2" if "fsdq" in new else None
    with pytest.raises(ConfigError) as caught:
        load_config(child, (), slice_name)
    assert expected in str(caught.value)


def test_the_bases_own_mistakes_are_told_with_its_file(folder: Path) -> None:
    child = on_base(folder, CHILD, GOOD.replace("learning_rate: 1e-4", "learning_rat: 1e-4"))
    with pytest.raises(ConfigError, match=r"base.yaml:13: .*learning_rat = "):
        load_config(child)


def test_slices_that_are_no_table_are_refused() -> None:
    problem = problem_of(GOOD + "slices: [v5e:2x2]\n")
    expected = "a.yaml:17: slices: should be a mapping of slices to their settings, not "
    assert problem.startswith(expected)
    problem = problem_of(GOOD + "slices:\n  v5e:2x2: {}\n  v5e:2x4: [1]\n")
    assert problem.startswith("a.yaml:19: slices.v5e:2x4: should be a mapping of settings, not ")


@pytest.mark.parametrize(
    ("name", "slice_name"),
    [(name, each) for name in packaged_configs() for each in slices_of(name)],
)
def test_every_slice_of_a_packaged_config_is_valid(name: str, slice_name: str) -> None:
    config = load_config(name, (), slice_name)
    parts = re.fullmatch(r"(?:(\d+)x)?(\w+):([\dx]+)", slice_name)
    assert parts is not None
    devices = int(parts[1] or 1) * math.prod(int(size) for size in parts[3].split("x"))
    devices *= CHIPS[parts[2]].devices
    assert math.prod(config.mesh.axes.values()) == devices
    if config.mesh.rollout is not None:
        assert math.prod(config.mesh.rollout.axes.values()) == devices


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_config_is_valid(name: str) -> None:
    config = load_config(name)
    assert config.title
    assert parse_config(dump_config(config), "dump") == config


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        (
            "steps: 4",
            "steps: 4\n    num_generations: 8",
            "a.yaml:13: stages.rl.num_generations = 8: unknown key; TRL's num_generations is "
            "stages.rl.outputs_per_question here",
        ),
        ("steps: 4", "steps: 4\n    beta: 0.1", "TRL's beta is stages.rl.loss.kl_coefficient here"),
        ("steps: 4", "steps: 4\n    loss: {beta: 0.1}", "is stages.rl.loss.kl_coefficient here"),
        ("steps: 4", "steps: 4\n    epsilon: 0.2", "is stages.rl.loss.clip_low, stages.rl.loss.cl"),
        ("name: small", "name: small\noutput_dir: x", "TRL's output_dir is output here"),
        ("name: small", "name: small\nbeta: 1", "is stages.NAME.loss.kl_coefficient here"),
        ("steps: 4", "steps: 4\n    max_prompt_length: 9", "is data.NAME.max_prompt_tokens here"),
        ('total"}', 'total", prompt_key: p}', "verl's prompt_key is data.train.fields here"),
        ("1e-4}", "1e-4, lr: 1}", "verl's lr is stages.rl.optimizer.learning_rate here"),
        ("steps: 4", "steps: 4\n    mini_batch_size: 1", "tunix's mini_batch_size is stages.rl.qu"),
        ("steps: 4", "steps: 4\n    num_iterations: 2", "none here: a sample is trained on once"),
        ("name: small", "name: small\nactor_rollout_ref: {}", "is model, mesh and stages here"),
        (
            "steps: 4",
            "steps: 4\n    kl_loss_mode: x",
            "tunix's kl_loss_mode is stages.rl.objective.",
        ),
        ("steps: 4", "steps: 4\n    vllm_server_port: 1", "none here: the model samples itself"),
        ("name: small", "name: small\nlora_r: 8", "none here: all weights are trained"),
    ],
)
def test_names_of_other_libraries_get_a_hint(old: str, new: str, hint: str) -> None:
    assert hint in problem_of(replaced(old, new))


def test_every_hint_names_settings_that_there_are() -> None:
    sections: dict[str, set[str]] = {
        "": set(RunConfig.model_fields),
        "data.NAME": set(DataSection.model_fields),
        "model": set(ModelSection.model_fields),
        "mesh": set(MeshSection.model_fields),
        "mesh.rollout": set(RolloutMesh.model_fields),
        "rewards.NAME": set(RewardSection.model_fields),
        "stages.NAME": {key for kind in KINDS_OF_STAGES for key in load_kind(kind).model_fields},
        "stages.NAME.loss": set(GRPOConfig.__dataclass_fields__),
        "stages.NAME.objective": {
            field.name for kind in get_args(ObjectiveSettings) for field in dataclasses.fields(kind)
        },
        "stages.NAME.optimizer": set(OptimizerSection.model_fields),
        "stages.NAME.dynamic_sampling": set(DynamicSampling.model_fields),
        "stages.NAME.distillation": set(OnPolicyDistillation.model_fields),
    }
    for names in OTHER_NAMES.values():
        for name, here in names.items():
            for key in re.split(r", | or | and ", here):
                section, _, last = key.rpartition(".")
                assert last in sections[section], (name, key)
                # A name that means the same in both needs no hint.
                assert (section, name) != (section, last) or name in ("chat_template_kwargs",)


def test_aliases_that_multiply_and_thousands_of_mistakes_are_soon_told() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefgh", "abcdefg", strict=True):
        lines.append(f"{name}: &{name} [{', '.join(['*' + before] * 9)}]")
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        parse_config("\n".join(lines), "a.yaml")
    with pytest.raises(ConfigError) as caught:
        parse_config("\n".join(f"k{number}: 1" for number in range(3000)), "a.yaml")
    assert 40 < len(caught.value.problems) < 60 and "more mistakes" in str(caught.value)
    with pytest.raises(ConfigError, match="a.yaml:1: base: .*http:// is not known"):
        parse_config("base: http://localhost/x.yaml", "a.yaml")
