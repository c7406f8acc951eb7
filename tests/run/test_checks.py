"""What is refused before any compute, and the rewards that end a run at its first batch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from r1jax import recipe
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.data.dataset_files import DatasetRow
from r1jax.metrics.heartbeat import span
from r1jax.planner import memory
from r1jax.planner.dry_run import describe
from r1jax.rewards import verifier
from r1jax.rollouts.scoring import check_first_rewards, is_scored
from r1jax.run import resolve as resolve_module
from r1jax.run.resolve import check, resolve
from r1jax.run.stop import RunError
from r1jax.settings.rewards import RewardSection
from r1jax.sharding import Layout
from r1jax.stages import supervised
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage

TINY = Path(__file__).parents[1] / "tiny.yaml"
_DEVICES = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")  # which go before the config
REWARDS = """
def broken(row, options):
    raise KeyError("no such thing")

def nothing(completions, **columns):
    return [None] * len(completions)

def level(completions, level, **columns):
    return [float(each) for each in level]

def needs(completion, lvl):
    return 1.0

def lists_need(prompts, completions, lvl, **columns):
    return [1.0] * len(completions)

def may_read(completion, lvl=1, **columns):
    return 1.0

def takes_nothing():
    return 1.0

def takes_a_prompt(completions, prompt):
    return [1.0] * len(completions)
"""


def rows(*answers: str, prompt: str = "1+1=") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "answer": answer, "level": i} for i, answer in enumerate(answers)]


def config(
    folder: Path, data: list[dict[str, Any]], rewards: dict[str, Any], **dataset: Any
) -> RunConfig:
    """Pretraining, then RL on the rows of a file; with a file of rewards beside the config."""
    plan = yaml.safe_load(TINY.read_text())
    plan["model"]["config"]["num_hidden_layers"] = 1
    base, _, zero = plan["stages"]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in data))
    plan["data"]["train"] = {"source": "task:running_total", "template": "plain", "limit": 50}
    plan["data"]["rows"] = {"source": f"jsonl:{source}", "template": "plain", **dataset}
    zero |= {"data": "rows", "steps": 2, "held_out": None}
    plan |= {"output": str(folder), "rewards": rewards, "stages": [base, zero]}
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "exits.py").write_text("import sys\nsys.exit(3)")
    (folder / "ends.py").write_text("import os\nos._exit(3)")
    (folder / "hangs.py").write_text("while True:\n    pass")
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
    outside: dict[str, Any] = {"my_rewards:level": {}, "my_rewards:may_read": {}}
    outside["my_rewards:needs"] = {"options": {"lvl": 1}}  # an option in place of a column
    outside["my_rewards:lists_need"] = {"weight": 0.0}  # it only measures
    blank_alone = config(tmp_path, data[:40], outside)
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
        (
            {"mine": {"function": "exits.py:f"}},
            {},
            r"yaml:\d+: rewards.mine.function = .exits.py:f.: importing exits.py failed: "
            r"SystemExit: 3; .*under if __name__ ==",
        ),
        (
            {"my_rewards.py:level": {}, "mine": {"function": "ends.py:f"}},
            {},
            r"yaml:\d+: rewards.mine.function = .ends.py:f.: importing ends.py ended the worker: "
            r"exit status 3; .*under if __name__ ==",
        ),
        (
            {"good": {"function": "my_rewards:level"}, "mine": {"function": "my_rewards.py:needs"}},
            {},
            r"config.yaml:\d+: rewards.mine.function = .my_rewards.py:needs.: its parameter 'lvl' "
            r"is no column of data.rows, which stage zero reads; there are \['answer', 'level', "
            r"'prompt'\]. .* or set rewards.mine.options.lvl",
        ),
        ({"my_rewards:lists_need": {}}, {}, "rewards.my_rewards:lists_need: its parameter 'lvl'"),
        ({"my_rewards:takes_nothing": {}}, {}, r"the function \(\) cannot be called with \(row, "),
        ({"my_rewards:takes_a_prompt": {}}, {}, "of lists is given no 'prompt'; take prompts"),
        ({"my_rewards:level": {"options": {"a": 1}}}, {"max_prompt_tokens": 3}, "all 2 prompts"),
        (
            {"accuracy": {}},
            {"template": "chat"},
            r"config.yaml:\d+: data.rows.template = .chat.: .*no chat template.*by stages.zero",
        ),
        (
            {"accuracy": {}},
            {"fields": {"answer": "a"}},
            r"yaml:\d+: data.rows.fields.answer = ",
        ),
        (
            {"accuracy": {}},
            {"source": "jsonl:no.jsonl"},
            r"yaml:\d+: data.rows.source = .*no f",
        ),
        (
            {"accuracy": {"domains": ["b"]}},
            {},
            r"yaml:\d+: stages.zero: no reward is",
        ),
        ({"choise": {}}, {}, r"yaml:\d+: rewards.choise"),
    ],
)
def test_mistakes_of_a_later_stage_are_found_before_the_first(
    tmp_path: Path, rewards: dict[str, Any], dataset: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(resolve(config(tmp_path, rows("1", "2"), rewards, **dataset)))


def test_a_column_of_few_rows_and_of_a_dataset_to_be_written_is_looked_for(tmp_path: Path) -> None:
    needs = {"my_rewards.py:needs": {}}
    few = [{**row, **({"lvl": 1} if i != 2 else {})} for i, row in enumerate(rows(*"123456"))]
    with pytest.raises(
        ConfigError, match=r"'lvl' is not in 1 of 6 rows \(.*rows.jsonl:3\) of data"
    ):
        check(resolve(config(tmp_path, few, needs)))
    check(resolve(config(tmp_path, few[3:], needs)))
    change = {
        "name": "made",
        "kind": "rejection_sampling",
        "data": "train",
        "rewards": ["accuracy"],
    }
    config(tmp_path, few, needs | {"accuracy": {}})
    plan = yaml.safe_load((tmp_path / "config.yaml").read_text())
    plan["data"]["rows"] = {"source": "stage:made", "template": "plain"}
    plan["stages"].insert(1, change | {"max_new_tokens": 16})
    message = r"yaml:\d+: .*'lvl' is no column of data.rows, .* \['answer', .*, 'tokens'\]"
    for domains, refused in ((None, True), (["maths"], True), (["other"], False)):
        plan["data"]["train"]["domain"] = "maths"
        plan["rewards"]["my_rewards.py:needs"] = {} if domains is None else {"domains": domains}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(plan))
        run = resolve(load_config(tmp_path / "config.yaml"))
        with pytest.raises(ConfigError, match=message) if refused else nullcontext():
            check(run)


def test_stages_write_the_columns_that_they_state() -> None:
    stated = RejectionSamplingStage.DESCRIPTION.dataset_columns
    assert stated == tuple(each.name for each in fields(DatasetRow))


def test_a_module_whose_import_never_ends_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verifier, "_LOAD_SECONDS", 2.0)
    monkeypatch.setattr(verifier, "_WARN_SECONDS", 0.2)
    rewards = {"good": {"function": "my_rewards.py:level"}, "mine": {"function": "hangs.py:f"}}
    with pytest.raises(
        ConfigError,
        match=r"yaml:\d+: rewards.mine.function = .hangs.py:f.: importing hangs.py did not end in "
        "2 s; .*under if __name__ ==",
    ):
        check(resolve(config(tmp_path, rows("1"), rewards)))
    (said,) = [each for each in caplog.messages if "imported" in each and "mine" in each]
    assert said == "rewards.mine: hangs.py:f is still being imported; that is ended after 2 s"


def changed(config: RunConfig, *overrides: str) -> RunConfig:
    return load_config(Path(str(config.folder)) / "config.yaml", overrides)


@pytest.mark.parametrize(
    ("data", "problems", "message"),
    [
        ("held_out", 7, "data.held_out.source = .*it has 4 rows, fewer than 7"),
        ("mix", 13, "data.mix.mixture: 13 rows need 7 of held_out, which has 4"),
    ],
)
def test_more_problems_than_there_are_are_refused(
    tmp_path: Path, data: str, problems: int, message: str
) -> None:
    plan = yaml.safe_load(TINY.read_text())
    plan["data"]["mix"] = {"mixture": {"held_out": 1, "train": 1}}
    plan["stages"] = [plan["stages"][1] | {"data": data, "problems": problems}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ConfigError, match=rf"yaml:\d+: {message}.*read by stages.before"):
        check(resolve(load_config(tmp_path / "config.yaml")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trackers=[wandb]", r"line: trackers = ..wandb..: wandb is not installed: pip install"),
        (
            "model.config.max_position_embeddings=19",
            r"zero.max_new_tokens = 16: with the prompts of data.rows, of up to 4 tokens, a sample "
            r"has 20, .* max_position_embeddings = 19. Set max_new_tokens to at most 15, or mod",
        ),
        ("model.max_position_embeddings=19", r"zero.max_new_tokens = 16: .* to at most 15"),
        (
            "stages.zero.sampling={cache_tokens: 60}",
            r"zero.sampling.cache_tokens = 60: .* one sample of 16 \+ 16 tokens has at least 64",
        ),
        ("mesh.cpu_devices=3", r"stages.base.rows_per_step / micro_batches = 4 is not a multiple"),
        (
            "data.train.source=jsonl:rows.jsonl",
            r"data.train.* row 0 has no text to train on",
        ),
    ],
)
def test_what_the_run_cannot_do_is_refused_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    find_spec = importlib.util.find_spec

    def without_wandb(name: str, package: str | None = None) -> object:
        return None if name == "wandb" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_wandb)
    run = changed(config(tmp_path, rows("1", "2"), {"accuracy": {}}), override)
    monkeypatch.setattr(resolve_module, "split_cpu", lambda count: None)
    monkeypatch.setattr(Layout, "shards", lambda self, axis: run.mesh.cpu_devices)
    with pytest.raises(ConfigError, match=message):
        check(resolve(run))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("gs://", "no bucket is named; give a local path, or gs://BUCKET"),
        ("s3://x/y", "s3:// is not known; give a local path, or gs://BUCKET"),
        ("FOLDER/rows.jsonl", r"no directory can be made in FOLDER/rows.jsonl \(Not a directory\)"),
        ("/proc/runs", r"no directory can be made in /proc \(.*; give a directory that can be wr"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_with_its_line(
    tmp_path: Path, output: str, message: str
) -> None:
    config(tmp_path, rows("1"), {"accuracy": {}})
    output, message = (text.replace("FOLDER", str(tmp_path)) for text in (output, message))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"output": output}))
    before = sorted(tmp_path.iterdir())
    for at, run in (
        (r"config.yaml:\d+", load_config(path)),
        ("command line", load_config(path, [f"output={output}"])),
    ):
        with pytest.raises(ConfigError, match=f"{at}: output = .*: {message}"):
            check(resolve(run))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("mesh", "devices", "problem"),
    [
        (
            "cpu_devices: 3",
            None,
            "mesh.cpu_devices = 3: the weight embed: dimension 1 ('embed', size 16) is not "
            "divisible by 3, the size of mesh axes ('fsdp',); make it 1 or 2, or map",
        ),
        (
            "axes: {data: 1, fsdp: 1, tensor: 4}",
            4,
            "mesh.axes.tensor = 4: the weight layers.k: dimension 2 ('kv_heads', size 1) is not "
            "divisible by 4, the size of mesh axes ('tensor',); make it 1, or map",
        ),
        (
            "rollout: {axes: {data: 1, tensor: -1}}",
            4,
            "mesh.rollout.axes.tensor = -1: while sampling, the weight layers.k: dimension 2 "
            "('kv_heads', size 1) is not divisible by 4, the size of mesh axes ('tensor',)",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_a_weight_is_refused_with_its_line(
    tmp_path: Path, mesh: str, devices: int | None, problem: str
) -> None:
    config(tmp_path, rows("1"), {"accuracy": {}})
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text() + f"mesh:\n  {mesh}\n")
    line = len(path.read_text().splitlines())
    command = [sys.executable, "-m", "r1jax", "run", str(path), "--dry-run"]
    environment = {k: v for k, v in os.environ.items() if k not in _DEVICES} | {
        "JAX_PLATFORMS": "cpu",
        **({} if devices is None else {"JAX_NUM_CPU_DEVICES": str(devices)}),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{path}:{line}: {problem}"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_rows_of_which_none_fits_are_refused(tmp_path: Path) -> None:
    run = config(tmp_path, rows("1", "2"), {"accuracy": {}})
    (tmp_path / "long.jsonl").write_text(f'{{"text": "{"1+" * 40}1"}}\n' * 300)
    dataset = [f"data.rows.source=jsonl:{tmp_path}/long.jsonl", "data.rows.fields={text: text}"]
    long = changed(run, *dataset, "stages.base.data=rows")
    long = long.model_copy(update={"stages": long.stages[:1]})
    with pytest.raises(
        ConfigError,
        match=r"config.yaml:\d+: stages.base.row_tokens = 64: none of the 300 rows of data.rows .* "
        r"the shortest has 82 tokens. Set row_tokens to at least 82, or give shorter rows",
    ):
        check(resolve(long))
    # One that fits is enough.
    path = tmp_path / "long.jsonl"
    path.write_text(path.read_text() + '{"text": "1+1"}\n')
    check(resolve(long))


def test_a_model_may_be_used_beyond_its_positions_where_the_config_says_so(tmp_path: Path) -> None:
    further = ["model.config.max_position_embeddings=19", "model.max_position_embeddings=20"]
    run = changed(config(tmp_path, rows("1", "2"), {"accuracy": {}}), *further)
    resolved = resolve(run)
    check(resolved)
    assert resolved.models.of("zero").decoder.config.max_position_embeddings == 20


def test_a_small_cache_is_no_reason_to_refuse_slots_that_a_short_queue_has_not(
    tmp_path: Path,
) -> None:
    sampling = "stages.zero.sampling={cache_tokens: 64, slots: 50}"
    check(resolve(changed(config(tmp_path, rows("1", "2"), {"accuracy": {}}), sampling)))


def test_memory_that_the_machine_lacks_is_said_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, rows("1", "2"), {"accuracy": {}})
    monkeypatch.setattr(memory, "free_memory", lambda device: 20_000)
    message = (
        r"config.yaml:\d+: stages.base: its update needs .* GiB on each device \(activations .*\), "
        r"and .* GiB are free. What would help: more micro_batches; .*more devices"
    )
    with pytest.raises(ConfigError, match=message) as refused:
        recipe.run(run)
    assert refused.value.problems == tuple(describe(run)["too_large"])
    assert len(refused.value.problems) == 2  # both stages
    assert not (tmp_path / "tiny-s0/stages").exists()


def test_memory_that_runs_out_later_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: object) -> None:
        with span("update"):
            jax.numpy.zeros(2**50).block_until_ready()

    monkeypatch.setattr(supervised, "run", allocate)
    with pytest.raises(RunError) as ended:
        recipe.run(config(tmp_path, rows("1", "2"), {"accuracy": {}}))
    message = str(ended.value)
    assert re.search(
        r"config.yaml:\d+: stages.base: out of memory \(stage base, step 0, after update\): it "
        r"needs 4,194,304 GiB more, and .* GiB are free on a device. By estimate the fullest "
        r"program, update, takes .* GiB. What would help: more micro_batches",
        message,
    ), message
    assert "\n" not in message


def test_weights_that_are_all_0_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"yaml:\d+: stages.zero trains on nothing: .*accuracy, format, are"
    ):
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
