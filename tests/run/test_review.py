"""What a run refuses about a run directory that is there, and a dry run in the same words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from r1jax import recipe
from r1jax.cli import app
from r1jax.config.lineage import ingredients
from r1jax.config.load import ConfigError, load_config
from r1jax.config.run_config import RunConfig
from r1jax.lock import locked
from r1jax.run.selection import Selection

CONFIG = """
name: small
model:
  tokenizer: characters:running_total
  compute_dtype: float32
  remat: none
  log_prob_chunk: 8
  config: {model_type: qwen2, vocab_size: 20, hidden_size: 16, intermediate_size: 32,
    num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, tie_word_embeddings: true}
data:
  train: {source: "task:running_total", template: plain, limit: 20}
rewards: {accuracy: {}}
trackers: []
stages:
  - &train {name: base, kind: pretrain, data: train, steps: 4, rows_per_step: 4, row_tokens: 64,
      optimizer: {learning_rate: 0.01}}
  - &test {name: before, kind: evaluate, data: train, samples_per_problem: 1, problems_per_batch: 2,
      max_new_tokens: 4}
  - {<<: *train, name: tuned}
  - {<<: *test, name: after}
"""
NAMES = ("base", "before", "tuned", "after")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The config of a run that is finished, as its record says."""
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG + f"output: {tmp_path / 'runs'}\n")
    leave(load_config(path), dict.fromkeys(NAMES, "done"))
    return path


def leave(config: RunConfig, stages: dict[str, str]) -> None:
    """Writes the record of a run whose stages have come so far, and the steps of checkpoints."""
    home = Path(config.output) / "small-s0"
    entries = {
        name: {
            "kind": config.stage(name).kind,
            "status": status,
            "seconds": {},
            "ingredients": ingredients(config, name),
        }
        for name, status in stages.items()
    }
    for index, name in enumerate(NAMES):
        if name in stages:
            folder = home / "stages" / f"{index:02d}-{name}"
            folder /= "checkpoints/4" if config.stage(name).DESCRIPTION.trains else "."
            folder.mkdir(parents=True, exist_ok=True)
    (home / "run.json").write_text(json.dumps({"name": "small", "seed": 0, "stages": entries}))


def files(folder: Path) -> list[tuple[Path, int]]:
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def again(*names: str) -> str:
    return " ".join(f"--restart {name}" for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stages.tuned.optimizer.learning_rate=1e-4"],
            "small-s0: the stages tuned and after are finished with other settings "
            "(stages.tuned.optimizer.learning_rate: 0.01 -> 0.0001). Put them back, give the new "
            f"run another name, or run these stages anew: the same command with "
            f"{again('tuned', 'after')}\n",
        ),
        # A longer stage goes on by itself; what rests on it does not.
        (
            ["stages.base.steps=6", "--only", "base"],
            "small-s0: the stages before, tuned and after are finished with other settings "
            "(stages.base.steps: 4 -> 6). Put them back, give the new run another name, or run "
            f"these stages anew: the same command with {again('before', 'tuned', 'after')}\n",
        ),
        (
            ["stages.tuned.steps=6", "--restart", "base"],
            "small-s0: the stage after is finished with other settings (stages.tuned.steps: "
            "4 -> 6). Put them back, give the new run another name, or run these stages anew: the "
            f"same command with {again(*NAMES)}\n",
        ),
        (
            ["--restart", "base"],
            "--restart base: before, tuned and after, which have begun, rest on it; give the same "
            f"command with {again(*NAMES)}, or another name to the new run\n",
        ),
        (
            ["--restart", "tuned"],
            "--restart tuned: after, which has begun, rests on it; give the same command with "
            f"{again('tuned', 'after')}, or another name to the new run\n",
        ),
        (
            ["stages.after.weights=base"],
            "small-s0: the stage after is finished with other settings (stages.after.weights: "
            "None -> 'base'; it rests on tuned no longer; it rests on base now). Put them back",
        ),
        (
            ["--only", "after", "seed=1"],
            "the stage after needs tuned, which is not finished; run it first",
        ),
        (
            ["--profile-steps", "1:2"],
            "--profile-steps 1:2: no stage takes these steps (base is finished; tuned is finished)",
        ),
    ],
)
def test_a_dry_run_refuses_a_directory_in_the_words_of_a_run(
    path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No models are loaded, and nothing is written."""

    def refuse(*_: object) -> None:
        raise AssertionError("the record says enough")

    monkeypatch.setattr(recipe, "resolve", refuse)
    before = files(path.parent)
    run, dry_run = call(path, *arguments), call(path, *arguments, "--dry-run")
    assert (run.exit_code, dry_run.exit_code, dry_run.stdout) == (2, 2, ""), dry_run.output
    assert run.stderr == dry_run.stderr and message in run.stderr, run.stderr
    assert "R1JAX_DEBUG" not in run.stderr
    assert files(path.parent) == before


def test_stages_are_told_apart_by_how_far_they_came(path: Path) -> None:
    config = load_config(path)
    leave(config, {"base": "done", "before": "done", "tuned": "running"})
    changed = load_config(path, ["stages.base.optimizer.learning_rate=1"])
    said = "stages base and before are finished, and the stage tuned was begun with other settings"
    with pytest.raises(ValueError, match=said):
        recipe.review(changed)
    # Of a stage that saved nothing, nothing is lost.
    (path.parent / "runs/small-s0/stages/02-tuned/checkpoints/4").rmdir()
    mended = load_config(path, ["stages.tuned.optimizer.learning_rate=1"])
    assert [stage.name for stage in recipe.review(mended)] == ["tuned", "after"]


def test_a_dry_run_says_by_whom_the_directory_is_held(path: Path) -> None:
    with locked(path.parent / "runs/small-s0"):
        refused = call(path, "--dry-run")
    assert refused.exit_code == 2 and f"process {os.getpid()} on " in refused.stderr
    assert " is running it; wait for its end" in refused.stderr


def test_a_directory_that_no_record_is_in_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG + f"output: {tmp_path / 'runs'}\n")
    assert call(path, "--dry-run").exit_code == 0
    assert list(tmp_path.iterdir()) == [path]


def rows_of(stages: Sequence[str], output: str) -> set[str]:
    return {
        name for name in stages for line in output.splitlines() if line.startswith(f" {name}: ")
    }


@pytest.mark.parametrize(
    ("selection", "stages"),
    [
        ([], NAMES),
        (["--until", "before"], ("base", "before")),
        (["--only", "base"], ("base",)),
        (["--from", "base", "--until", "tuned"], ("base", "before", "tuned")),
    ],
)
def test_a_dry_run_shows_what_will_run_and_that_nothing_is_wrong(
    path: Path, selection: list[str], stages: tuple[str, ...]
) -> None:
    done = call(path, "seed=1", "--dry-run", *selection)
    assert done.exit_code == 0, done.output
    assert rows_of(NAMES, done.stdout) == set(stages)
    last = done.stdout.splitlines()[-1]
    count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    assert last.startswith(
        f"Nothing to refuse: {count} to run ({', '.join(stages)}); by estimate the fullest "
        "program, update of base, needs "
    ), last
    assert last.endswith(" on each device. The same command without --dry-run runs it.")


def test_a_dry_run_leaves_out_what_is_finished(path: Path) -> None:
    done = call(path, "--dry-run")
    assert done.stdout.splitlines()[-1] == (
        f"Nothing to refuse, and nothing to run: {', '.join(NAMES)} finished before."
    )
    longer = call(path, "stages.tuned.steps=6", "--restart", "after", "--dry-run")
    assert rows_of(NAMES, longer.stdout) == {"tuned", "after"}, longer.output
    last = longer.stdout.splitlines()[-1]
    assert "2 stages to run (tuned, after), 2 stages finished before (base, before); " in last


def test_models_of_stages_that_do_not_run_are_not_shown(tmp_path: Path) -> None:
    plan = yaml.safe_load(CONFIG) | {"output": str(tmp_path)}
    plan["models"] = {"student": plan["model"]}
    plan["stages"][2]["weights"] = "student"
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(plan))
    both = call(path, "--dry-run").stdout
    one = call(path, "--dry-run", "--until", "before").stdout
    assert " student.weights " in both and " model.weights " in both
    assert " student.weights " not in one and " model.weights " in one


def test_a_stage_removed_by_restart_is_there_until_nothing_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="rests on it"):
        recipe.run(load_config(path), Selection(restart=("tuned",)))
    assert (path.parent / "runs/small-s0/stages/02-tuned").is_dir()


def test_an_output_on_no_known_bucket_is_refused_with_its_place(path: Path) -> None:
    with pytest.raises(ConfigError, match="command line: output = .*: s3:// is not known"):
        recipe.review(load_config(path, ["output=s3://x"]))
