"""What README and docs tell people to type: every command exists, with these options and files.

Each fenced command is read as the shell and the command line would; packaged configs are loaded
with the overrides that stand there, stages and slices have to exist. Then each command is run as it
is written, on one small run (`my.yaml`), whose directory stands for RUN_DIR; or `NOT_RUN` says why
it is not.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import forked
import pytest
import typer
import typer.main
import yaml

from r1jax.cli import app
from r1jax.config.load import load_config, parse_config
from r1jax.config.packaged import packaged_configs
from r1jax.config.reference import explain
from r1jax.config.slices import slice_name
from r1jax.planner.plan import parse_mesh
from r1jax.planner.topologies import is_slice
from r1jax.run.selection import Selection
from r1jax.settings.benchmarks import BENCHMARKS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tpu_scripts/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml"))
TARGETS = re.findall(r"^([a-z0-9.][\w./-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Of a person's own: a file, a directory, a model.
ClickException = typer.BadParameter.__mro__[2]  # of the click that typer brings
OWN = re.compile(r"my[_.].*|mine.*|CONFIG|NAME|[A-Z_]*DIR(@.*)?|DEST")
COMMANDS: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command of a piece of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"^for .*; do |; done$", "", line.strip())
        words = shlex.split(line, comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", ";", ">")), len(words))
            simple = words[:end]
            while simple and re.match(r"[A-Z0-9_]+=", simple[0]):
                simple = simple[1:]
            if simple:
                yield simple
            words = words[end + 1 :] if end < len(words) and words[end] != ">" else []


def fenced() -> list[tuple[str, list[str]]]:
    found = [(path, words) for path in PAGES for b in blocks(path, "bash") for words in commands(b)]
    for path in CONFIGS:  # what their heads say, `#   r1jax run NAME   # ...`
        lines = re.findall(r"^# {3}((?:r1jax|pip) .*)$", path.read_text(), re.MULTILINE)
        found += [(path, words) for line in lines for words in commands(line)]
    return [(path.relative_to(ROOT).as_posix(), words) for path, words in found]


def known_config(name: str, parsed: Mapping[str, Any], slice_given: str | None) -> None:
    """A packaged config takes these overrides, and has these stages and slices."""
    if OWN.fullmatch(name):
        return
    path = name if name in packaged_configs() else str(ROOT / name)
    overrides = [each for each in parsed.get("overrides") or () if each != "..."]
    overrides = [each.replace("$seed", "1") for each in overrides]
    config = load_config(path, overrides, slice_given)
    only = parsed.get("only")
    for stage in [only] if isinstance(only, str) else only or ():
        Selection(only=stage).stages(config)
    Selection(None, parsed.get("first"), parsed.get("last")).stages(config)
    for mesh in parsed.get("mesh") or ():
        parse_mesh(mesh, config.mesh)


def check_r1jax(words: list[str]) -> None:
    if words[1:] in (["--help"], ["COMMAND", "--help"]):
        return
    name, rest = words[1], [word for word in words[2:] if word != "..."]
    parsed = COMMANDS[name].make_context(name, rest).params
    slices = parsed.get("slices") or [parsed.get("slice_name")]
    for each in [*slices, *(parsed.get("topology") or ())]:
        assert each is None or is_slice(slice_name(each)), each
    if name in ("run", "plan"):
        for each in slices:
            known_config(parsed["config"], parsed, each)
    elif name == "plan-all":
        for config in parsed["configs"] or ():
            known_config(config, {}, None)
    elif name == "eval":
        assert set(parsed["benchmark"] or ()) <= set(BENCHMARKS)
    elif name == "explain":
        assert OWN.fullmatch(words[2]) or words[2] == "KEY" or explain(words[2])


def check_make(words: list[str]) -> None:
    for word in words[1:]:
        assert "=" in word or word in TARGETS, word


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert os.access(script, os.X_OK), words[0]
    rest = [word for word in words[1:] if word not in ("--dry-run", "...")]
    if script.name in ("run.sh", "launch.sh"):
        parsed = COMMANDS["run"].make_context("run", rest).params
        known_config(parsed["config"], parsed, None)
    else:
        assert not rest or script.name == "tail.sh", words


def check_pip(words: list[str]) -> None:
    for word in words:
        extras = re.fullmatch(r"(?:r1jax|\.)\[([^\]]*)\].*", word)
        assert extras is None or set(extras[1].split(",")) <= set(EXTRAS), word


def check_copy(words: list[str]) -> None:
    assert (ROOT / words[1]).is_file(), words


def check_python(words: list[str]) -> None:
    """A script of this project, with options that it has."""
    text = (ROOT / words[1]).read_text()
    for word in words[2:]:
        assert not word.startswith("--") or f'"{word}"' in text, words


def others(_: list[str]) -> None:
    """Programs that are not ours."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    **dict.fromkeys(("r1jax", ".venv/bin/r1jax"), check_r1jax),
    **dict.fromkeys(("pip", "python3", ".venv/bin/pip"), check_pip),
    "make": check_make,
    "python": check_python,
    "cp": check_copy,
    **dict.fromkeys(("gcloud", "ssh-keygen", "eval", "ssh-add", "docker", "xprof", "git"), others),
}


@pytest.mark.parametrize("page", sorted({page for page, _ in fenced()}))
def test_every_command_exists(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in (words for where, words in fenced() if where == page):
        check = check_script if words[0].startswith("tpu_scripts/") else CHECKS.get(words[0])
        assert check is not None, f"{page}: nothing checks {' '.join(words)}"
        try:
            check(words)
        except (ClickException, ValueError, LookupError, AssertionError) as error:
            raise AssertionError(f"{page}: {' '.join(words)}: {error}") from error


def test_commands_in_a_sentence_have_these_options() -> None:
    for path in PAGES:
        for line in re.findall(r"`(r1jax [a-z][^`]*)`", path.read_text()):
            words = re.sub(r"\s+", " ", line).split()
            assert words[1] in COMMANDS, f"{path.name}: {line}"
            known = {option for each in COMMANDS[words[1]].params for option in each.opts}
            given = {word for word in words if re.match(r"--\w", word)}
            assert given <= known | {"--help"}, f"{path.name}: {line}"


def test_commands_are_found() -> None:
    """And a mistake in one is."""
    found = {words[0] for _, words in fenced()}
    assert {"r1jax", "make", "tpu_scripts/run.sh", "pip"} <= found and len(fenced()) > 60
    for wrong in (
        "r1jax run tiny/r1_zero --fro base",
        "r1jax run tiny/r1_zero stages.zero.step=1",
        "r1jax run tiny/r1_zeros",
        "r1jax plan tiny/r1_zero --topology v7:4x4",
        "r1jax plan r1_zero/qwen2.5-32b --slice v5p:2x2x1",
        "r1jax plan qwen2.5-1.5b/r1 --topology v5e:4x4 --only zeros",
        "r1jax configurations",
        "r1jax eval DIR --benchmark aime_1924",
        "make dmeo",
        "pip install 'r1jax[hff]'",
        "cp tpu_scripts/slice.env.exmaple tpu_scripts/slice.env",
    ):
        (words,) = commands(wrong)
        with pytest.raises((ClickException, ValueError, LookupError, AssertionError)):
            CHECKS[words[0]](words)


# --- Commands that are run -----------------------------------------------------------------------

TESTS = Path(__file__).parents[1]
RUN = "runs/tiny-s1"
STANDS_FOR = {
    **dict.fromkeys(("RUN_DIR", "RUN_OR_MODEL_DIR", "RUN_A"), RUN),
    "RUN_B": "runs/another",
    "RUN_DIR@300": f"{RUN}@2",
    "DEST": "exported",
    "my.yaml": "my.yaml",
}
FIRST = "r1jax run my.yaml seed=1 stages.rl.optimizer.learning_rate=1e-6"
# A command that is run -> what it prints.
PRINTS = {
    FIRST: "report",
    "r1jax eval RUN_OR_MODEL_DIR --config my.yaml": "after: key-value cache",
    "r1jax sample RUN_OR_MODEL_DIR --prompt 7+5-3+9= --template plain": "",
    "r1jax sample RUN_DIR@300": "",
    "r1jax score --reward accuracy --in rows.jsonl --out scored.jsonl": "right: 1",
    "r1jax score --reward my_rewards.py:brevity --option most=80 --in rows.jsonl --out "
    "scored.jsonl": "right: 2",
    "r1jax export RUN_DIR DEST": "exported: exported",
    "r1jax report RUN_DIR": "report:",
    "r1jax report RUN_A RUN_B --compare": "compare:",
    "r1jax plan r1_zero/qwen2.5-32b --slice v5p:4x4x8 --check": "",
    "r1jax plan qwen2.5-1.5b/r1_zero_gsm8k --topology v6e-16 --check": "",
    "r1jax plan r1_zero/qwen2.5-math-7b --slice v6e:8x8 --check": "",
    "r1jax plan qwen2.5-1.5b/r1_zero_gsm8k --topology v6e-64 --check stages.rl.micro_batches=8": "",
    "r1jax run tiny/deepseek_v3_r1_zero": "r1_zero",
    "r1jax run tiny/ppo seed=$seed": "ppo",
    ".venv/bin/r1jax run tiny/r1_zero": "r1_zero",
}
ALSO = {"r1jax sample RUN_DIR@300": ["--prompt", "1+1=", "--template", "plain"]}
CHECKED = ("r1jax run tiny/", ".venv/bin/r1jax run tiny/", "r1jax eval RUN")  # by --dry-run
# The beginning of a command that is not run here -> why not, or which test runs it.
NOT_RUN = {
    "make ": "CI's own steps, or minutes: the Makefile's targets are looked up",
    "pip ": "packages",
    ".venv/bin/pip ": "packages",
    "python3 -m venv": "packages",
    "cp tpu_scripts": "tests/tpu_scripts: every script, with stand-ins for gcloud and kubectl",
    "tpu_scripts/": "tests/tpu_scripts: every script, with stand-ins for gcloud and kubectl",
    "gcloud ": "Google Cloud",
    "ssh-": "Google Cloud",
    "eval ": "Google Cloud",
    "docker ": "Google Cloud",
    "python benchmarks/": "minutes to hours, beside other libraries",
    "r1jax plan ": "the compilers of TPUs and GPUs, minutes: tests/planner plans small ones",
    "r1jax run r1_": "weights and data of the hub; tests/config/test_packaged.py",
    "r1jax run qwen2.5": "weights and data of the hub; tests/config/test_packaged.py",
    "r1jax run smollm2-135m": "weights of the hub, and reasoning-gym",
    "r1jax run distill/": "weights and data of the hub; tests/config/test_packaged.py",
    "r1jax run tiny/r1": "25 minutes: make r1-seeds",
    "r1jax run tiny/": "minutes each; tests/config/test_packaged.py",
    "r1jax eval": "benchmarks of the hub; tests/evaluation/test_benchmarks.py",
    "r1jax report": "several seeds: tests/report/test_seeds.py",
    "r1jax export RUN_DIR DEST --dtype fp8": "a DeepSeek model: tests/weights/test_fp8.py",
    "r1jax search": "compiles for a minute: tests/stages/test_search.py",
}


def documented() -> list[str]:
    return list(dict.fromkeys(shlex.join(words) for _, words in fenced()))


def plainly(command: str) -> str:
    return " ".join(shlex.split(command))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as a user has it: a config, rewards, rows; and the config's run, finished."""
    folder = tmp_path_factory.mktemp("user")
    plan = yaml.safe_load((TESTS / "tiny.yaml").read_text())
    base, after, _ = plan["stages"]
    plan["stages"] = [base | {"name": "rl", "steps": 2}, after | {"name": "after"}]
    plan["rewards"] = {"format": {}, "my_rewards.py:brevity": {"options": {"most": 80}}}
    (folder / "my.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    (folder / "my_rewards.py").write_text(
        "def brevity(completion, most):\n    return float(len(completion) <= most)\n"
    )
    rows = [{"prompt": "1+1", "completion": f"\\boxed{{{i}}}", "answer": "2"} for i in (2, 3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(FIRST, folder)
    assert done.returncode == 0, done.stdout[-2000:]
    shutil.copytree(folder / RUN, folder / "runs/another")
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [STANDS_FOR.get(word, word) for word in shlex.split(command.replace("$seed", "1"))[1:]]
    words += ALSO.get(plainly(command), [])
    if command.startswith(CHECKED):
        words.append("--dry-run")
    return forked.run("-m", "r1jax", *words, cwd=folder, one_output=True)


def test_every_command_is_run_or_says_why_not() -> None:
    known = [plainly(command) for command in documented()]
    assert set(PRINTS) <= set(known), set(PRINTS) - set(known)
    for command in set(known) - set(PRINTS):
        assert command.startswith(tuple(NOT_RUN)), f"not run, and without a reason: {command}"
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in known), f"no command: {start}"


@pytest.mark.parametrize("command", [each for each in documented() if plainly(each) in PRINTS])
def test_a_command_runs(command: str, folder: Path) -> None:
    done = run(command, folder) if plainly(command) != FIRST else None
    if done is not None:
        assert done.returncode == 0, done.stdout[-2000:]
        assert PRINTS[plainly(command)] in done.stdout


# --- Configs and tables --------------------------------------------------------------------------

STUB = """
name: page
model: {tokenizer: "characters:running_total", config: {model_type: qwen2, vocab_size: 20,
  hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
  num_key_value_heads: 1}}
data: {stub: {source: "task:running_total", template: plain}}
stages: [{name: base, kind: pretrain, data: stub, steps: 1, rows_per_step: 4, row_tokens: 64,
  optimizer: {learning_rate: 0.01}}]
"""


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in PAGES])
def test_every_piece_of_a_config_is_one(page: str) -> None:
    for block in blocks(ROOT / page, "yaml"):
        for text in re.split(r"^# or$", block, flags=re.MULTILINE):
            if "..." in text or "my_package" in text:  # left out on purpose
                assert yaml.safe_load(re.sub(r",? *\.\.\.", "", text)), text
                continue
            document = yaml.safe_load(STUB)
            for key, value in yaml.safe_load(text).items():
                both = isinstance(value, dict) and key == "data"
                document[key] = document[key] | value if both else value
            parse_config(yaml.safe_dump(document), f"{page}: {text}")


# How each table with figures is made. Others say what words mean.
MADE_BY = {
    "| seed | pass@1 before |": ("make demo-seeds", "tiny/deepseek_v3_r1_zero"),
    "| step | 0 | 5 |": ("make r1-seeds",),
    "| % | maths | code |": ("make r1-seeds",),
    "| 671B | slice |": ("configs/PLANS.md",),
    "| | R1-Zero | first RL of R1 |": ("paper",),
    "| pass@1 of held-out problems |": ("tiny/ppo",),
    "| one student |": ("tiny/distillation",),
    "| weights | attempt 1 |": ("tiny/self_correction",),
    "| weights | right | majority of 16 |": ("tiny/process_reward",),
    "| way to an answer |": ("tiny/search",),
    "| published": ("published",),
    "| lengths | r1jax |": ("benchmarks/beside_peers.py",),
    "| figure | value |": ("benchmarks/long_tail.py",),
    "| 96 held-out sums": ("smollm2-135m/r1_zero",),
    "| program | estimated |": ("benchmarks/gpu_estimates.py",),
}


def test_every_table_with_figures_says_how_it_is_made() -> None:
    for path in PAGES:
        text = path.read_text()
        for table in re.findall(r"^\|.*\n\|[-| :]+\n(?:\|.*\n)+", text, re.MULTILINE):
            figures = len(re.findall(r"\|\s*[\d.,]+ ?(?:%|s)?(?: [\[(][^|]*)?(?=\s*\|)", table))
            if figures > 4:
                maker = [how for head, how in MADE_BY.items() if table.startswith(head)]
                assert maker, f"{path.name}: how is this table made?\n{table[:200]}"
                assert any(each in text for each in maker[0])


def test_the_table_of_deepseek_v3_is_a_part_of_the_plans() -> None:
    readme = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"^\| 671B \|.*\n\|[-|]+\n((?:\|.*\n)+)", readme, re.MULTILINE)
    lines = (ROOT / "configs/PLANS.md").read_text().splitlines()
    plans = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    head = plans[0]
    columns = [head.index(n) for n in ("HBM free", "time of a", "tokens/s", "bound by", "fits")]
    names = {"SFT": "r1_sft/deepseek-v3-base", "R1-Zero": "r1_zero/deepseek-v3-base"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert {(row[0], row[1]) for row in rows} == {
        (short, plan[1]) for plan in plans for short, name in names.items() if plan[0] == name
    }
    for kind, where, free, step, rate, waits in rows:
        (plan,) = [plan for plan in plans if plan[:2] == [names[kind], where]]
        wanted = [plan[i] for i in columns]
        tight = " (tight)" if wanted[4] == "tight" else ""
        assert [free, f"step: {step}", rate, waits] == [f"{wanted[0]}{tight}", *wanted[1:4]]
