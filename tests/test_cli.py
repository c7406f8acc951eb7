"""Each command hands on what was typed, and each mistake is a message with exit status 2."""

from __future__ import annotations

import gc
import json
import linecache
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import typer
from typer.testing import CliRunner, Result

from r1jax.__main__ import _FLAGS as FLAGS
from r1jax.__main__ import _OPTIONS as OPTIONS
from r1jax.__main__ import main
from r1jax.cli import app
from r1jax.config.load import dump_config, load_config, parse_config
from r1jax.config.packaged import packaged_configs
from r1jax.metrics.profiling import ProfiledSteps
from r1jax.run.selection import Selection
from r1jax.run.stop import RunError

CONFIG = """\
name: small
seed: 3
model: {path: some/model}
data: {train: {source: "task:running_total"}}
rewards: {accuracy: {}}
stages:
  - {name: first, kind: evaluate, data: train}
  - {name: last, kind: evaluate, data: train}
"""

Replace = Callable[..., MagicMock]


def invoke(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(part) for part in arguments], input=stdin)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "small-s3"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_config(parse_config(CONFIG, "test")))
    return path


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Replaces a function by a mock that refuses calls the real one would refuse."""

    def replace(module: Any, name: str, **behaviour: Any) -> MagicMock:
        mock: MagicMock = create_autospec(getattr(module, name), **behaviour)
        monkeypatch.setattr(module, name, mock)
        return mock

    return replace


@pytest.fixture
def recipe() -> Any:
    from r1jax import recipe

    return recipe


# --- run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 143])
def test_run_gives_the_resolved_config_and_the_exit_status(
    config: Path, recipe: Any, replace: Replace, code: int
) -> None:
    run = replace(recipe, "run", return_value=code)
    result = invoke("run", config, "seed=5", "stages.last.problems=2")
    assert result.exit_code == code, result.output
    settings = load_config(config, ["seed=5", "stages.last.problems=2"])
    run.assert_called_once_with(settings, Selection(), None)


def test_run_selects_stages(config: Path, recipe: Any, replace: Replace) -> None:
    run = replace(recipe, "run", return_value=0)
    assert invoke("run", config, "--from", "first", "--until", "last").exit_code == 0
    assert run.call_args.args[1] == Selection(first="first", last="last")
    assert invoke("run", config, "--only", "last").exit_code == 0
    assert run.call_args.args[1] == Selection(only="last")


def test_run_profiles_steps(config: Path, recipe: Any, replace: Replace) -> None:
    run = replace(recipe, "run", return_value=0)
    assert invoke("run", config, "--profile-steps", "first:10:12").exit_code == 0
    assert run.call_args.args[2] == ProfiledSteps(10, 12, "first")
    result = invoke("run", config, "--profile-steps", "10-12")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("--profile-steps 10-12: give FIRST:LAST")
    run.assert_called_once()


def test_dry_run_prints_and_runs_nothing(config: Path, recipe: Any, replace: Replace) -> None:
    from r1jax.planner import dry_run

    run = replace(recipe, "run")
    weight = {
        "name": "layers.[q]",
        "shape": (2, 48),
        "dtype": "float32",
        "sharding": "P(None, 'fsdp')",
        "bytes": 384,
    }
    description = {
        "parameters": 1234567,
        "devices": "8 x TPU",
        "weights": [weight],
        "memory": [{"what": "optimizer", "bytes": 3 * 2**20}],
        "notes": ["data.train: 1 of 9 rows"],
    }
    replace(dry_run, "describe", return_value=description)
    refused = invoke("run", config, "--dry-run", "--only", "nothing")
    assert refused.exit_code == 2 and "--only nothing: no such stage" in refused.output
    result = invoke("run", config, "--dry-run", "seed=5")
    assert result.exit_code == 0, result.output
    run.assert_not_called()
    # The resolved config comes first, whole, as YAML.
    yaml_text, _, rest = result.output.partition("\ndevices: ")
    assert parse_config(yaml_text, "output") == load_config(config, ["seed=5"])
    for part in (
        "8 x TPU",
        "1,234,567",
        "layers.[q]",
        "2 x 48",
        "P(None, 'fsdp')",
        "384 B",
        "3 MiB",
        "\ndata.train: 1 of 9 rows\n",
    ):
        assert part in rest, part


def test_mistakes_in_a_config_are_one_message_each(config: Path) -> None:
    result = invoke("run", config, "sede=1", "stages.last.problems=none")
    assert result.exit_code == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("command line: sede = 1: unknown key")
    assert second.startswith('command line: stages.last.problems = "none": should be an integer')


def test_debug_shows_the_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1JAX_DEBUG", "1")
    assert isinstance(invoke("run", config, "sede=1").exception, ValueError)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("data.train: no rows"), 2, "data.train: no rows"),
        (FileNotFoundError(2, "No such file or directory", "rows.jsonl"), 2, "rows.jsonl: No such"),
        (ImportError("pip install 'r1jax[hf]'"), 2, "pip install 'r1jax[hf]'"),
    ],
)
def test_errors_with_a_reason_are_messages(
    config: Path, recipe: Any, replace: Replace, error: Exception, code: int, text: str
) -> None:
    replace(recipe, "run", side_effect=error)
    result = invoke("run", config)
    assert result.exit_code == code
    assert result.stderr.startswith(text)
    # Such an error may be a fault of r1jax after all: it says how to find out.
    assert "R1JAX_DEBUG=1" in result.stderr


@pytest.mark.parametrize("problem", ["int('x')", "open('nothing.jsonl')", "json.loads('{')"])
def test_errors_of_others_say_where_they_are_from(
    config: Path, recipe: Any, replace: Replace, problem: str
) -> None:
    """Not those that r1jax itself raised with a reason, whatever that was."""
    source = f"import json\ndef fails():\n    {problem}\ndef refuses():\n    raise ValueError(\n"
    source += '        "data.train: no rows"\n    )\n'
    package = Path(recipe.__file__).parent / "not_there.py"
    functions: dict[str, Any] = {}
    exec(compile(source, str(package), "exec"), functions)
    lines = source.splitlines(keepends=True)
    linecache.cache[str(package)] = (len(source), None, lines, str(package))
    try:
        run = replace(recipe, "run", side_effect=lambda *_: functions["fails"]())
        result = invoke("run", config)
        assert result.exit_code == 2, result.exception
        assert result.stderr.endswith(f"({package}:3; R1JAX_DEBUG=1 shows the traceback)\n")
        run.side_effect = lambda *_: functions["refuses"]()
        assert invoke("run", config).stderr == "data.train: no rows\n"
    finally:
        del linecache.cache[str(package)]


def test_a_run_that_gives_up_exits_with_its_advice(
    config: Path, recipe: Any, replace: Replace
) -> None:
    replace(recipe, "run", side_effect=RunError("5 non-finite steps: lower the rate"))
    result = invoke("run", config)
    assert (result.exit_code, result.stderr) == (1, "5 non-finite steps: lower the rate\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("XLA"), KeyError("bug"), ModuleNotFoundError("x", name="x")]
)
def test_faults_keep_their_traceback(
    config: Path, recipe: Any, replace: Replace, error: Exception
) -> None:
    replace(recipe, "run", side_effect=error)
    assert invoke("run", config).exception is error


def test_of_several_processes_each_signs_its_errors_and_only_the_first_speaks(
    config: Path, recipe: Any, replace: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r1jax import processes
    from r1jax.planner import dry_run

    monkeypatch.setattr(
        processes, "distributed_process", lambda: processes.DistributedProcess(3, 4, "", None)
    )
    run = replace(recipe, "run", side_effect=RunError("5 non-finite steps"))
    result = invoke("run", config)
    assert (result.exit_code, result.stderr) == (1, "[process 3] 5 non-finite steps\n")
    for fault in (KeyError("bug"), RuntimeError("XLA")):  # Python's traceback follows
        run.side_effect = fault
        assert invoke("run", config).stderr == "[process 3] failed:\n"
    run.side_effect, run.return_value = None, 143
    assert invoke("run", config).output == ""
    replace(dry_run, "describe", return_value={})
    assert invoke("run", config, "--dry-run").output == ""


# --- eval ----------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(recipe: Any, replace: Replace) -> MagicMock:
    """`recipe.run` that leaves the summary an evaluate stage leaves."""

    def run(config: Any, selection: Selection) -> int:
        for index, stage in enumerate(config.stages):
            directory = Path(config.output) / f"{config.name}-s{config.seed}" / "stages"
            directory = directory / f"{index:02d}-{stage.name}"
            directory.mkdir(parents=True)
            summary = {"problems": 7, "pass_at_1": {"value": 0.25, "low": 0.2, "high": 0.3125}}
            (directory / "summary.json").write_text(json.dumps(summary))
        return 0

    return replace(recipe, "run", side_effect=run)


def test_eval_of_a_run_takes_its_config_and_final_weights(
    run_directory: Path, evaluated: MagicMock
) -> None:
    for name in ("01-sft", "02-rl"):
        (run_directory / "stages" / name / "model").mkdir(parents=True)
    changed = "stages.last.samples_per_problem=2"
    result = invoke("eval", run_directory, changed, "--restart", "last")
    assert result.exit_code == 0, result.output
    assert evaluated.call_args.args[1] == Selection(restart=("last",))
    config = evaluated.call_args.args[0]
    assert config.model.path == str(run_directory / "stages" / "02-rl" / "model")
    assert [stage.name for stage in config.stages] == ["last"]
    assert config.stages[0].samples_per_problem == 2
    assert Path(config.output) == run_directory / "evaluations"
    for part in ("pass_at_1", "0.250", "0.200 to 0.312", "problems", "7"):
        assert part in result.output


def test_eval_in_another_process_says_nothing(
    run_directory: Path, evaluated: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r1jax import processes

    monkeypatch.setattr(
        processes, "distributed_process", lambda: processes.DistributedProcess(1, 2, "", None)
    )
    result = invoke("eval", run_directory)
    assert (result.exit_code, result.output) == (0, "")
    evaluated.assert_called_once()


def test_eval_of_another_model_needs_a_config(
    tmp_path: Path, config: Path, evaluated: MagicMock
) -> None:
    result = invoke("eval", "org/model")
    assert result.exit_code == 2
    assert "--config" in result.stderr
    result = invoke(
        "eval", "org/model", "--config", config, "--stage", "first", "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    settings = evaluated.call_args.args[0]
    assert settings.model.path == "org/model"
    assert [stage.name for stage in settings.stages] == ["first"]
    assert Path(settings.output) == tmp_path / "out"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "eval MODEL --config CONFIG --out s3://x",
            '--out: output = "s3://x": s3://x: s3:// is not',
        ),
        (
            "eval MODEL --config CONFIG --out gs://b",
            '--out: output = "gs://b": cannot read gs://b (',
        ),
        ("sample gs://b/x --prompt a", "MODEL gs://b/x: cannot read gs://b (no way). Check"),
        ("export s3://b DEST", "RUN_DIR s3://b: s3://b: s3:// is not known"),
        ("report gs://", "RUN_DIR gs://: gs://: no bucket is named"),
        ("report RUN --out s3://b", "--out s3://b: s3://b: s3:// is not known"),
        ("score --reward choice --in s3://b/x --out y", "--in s3:/b/x: only a local file"),
    ],
)
def test_a_wrong_url_and_an_unreachable_bucket_are_errors_of_their_argument(
    command: str, message: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = MagicMock(exists=MagicMock(side_effect=RuntimeError("no way")))
    monkeypatch.setattr("etils.epath.Path", lambda path: refuses)
    result = invoke(*command.replace("CONFIG", str(config)).split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.output and "Traceback" not in result.output


def test_eval_of_a_run_on_benchmarks(run_directory: Path, evaluated: MagicMock) -> None:
    weights = run_directory / "stages" / "02-rl" / "model"
    weights.mkdir(parents=True)
    asked = ("--benchmark", "aime_2024", "--benchmark", "math_500", "--benchmark", "aime_2024")
    result = invoke("eval", run_directory, *asked, "stages.math_500.problems=3")
    assert result.exit_code == 0, result.output
    config = evaluated.call_args.args[0]
    assert (config.model.path, config.model.tokenizer) == (str(weights), None)
    assert [stage.name for stage in config.stages] == ["aime_2024", "math_500"]
    assert config.stages[1].problems == 3
    assert Path(config.output) == run_directory / "evaluations"
    assert config.name == "small-s3-eval"
    for part in ("aime_2024", "math_500", "0.200 to 0.312", "results.json"):
        assert part in result.output
    assert invoke("eval", run_directory, "--benchmark", "aime").exit_code == 2


def test_eval_names_an_unknown_stage(config: Path) -> None:
    result = invoke("eval", "org/model", "--config", config, "--stage", "lost")
    assert result.exit_code == 2
    assert "'lost'" in result.stderr


# --- sample --------------------------------------------------------------------------------------


@pytest.fixture
def stream(replace: Replace) -> MagicMock:
    from r1jax import pretrained as sample

    def pieces(*_: Any, **__: Any) -> Iterator[tuple[int, str]]:
        yield from [(0, "one "), (1, "[red]second"), (0, "more"), (1, " too")]

    return replace(sample, "stream_completions", side_effect=pieces)


def test_sample_hands_on_every_setting(stream: MagicMock) -> None:
    result = invoke(
        *("sample", "dir", "--prompt", "1+1=", "-n", 2, "--max-new-tokens", 9, "--seed", 4),
        *("--temperature", 0.5, "--top-p", 0.8, "--top-k", 7, "--min-p", 0.1, "--stop", "x"),
        *("--stop", "y", "--template", "plain"),
    )
    assert result.exit_code == 0, result.output
    model, prompt, sampling, *rest = stream.call_args.args
    assert (model, prompt, rest) == ("dir", "1+1=", [2, 9, 4, "plain"])
    assert sampling.model_dump() == {
        "temperature": 0.5,
        "top_p": 0.8,
        "top_k": 7,
        "min_p": 0.1,
        "stop": ["x", "y"],
        "speculative": False,
        "slots": None,
        "cache_tokens": None,
    }
    # Whole completions one after the other, though they arrive interleaved.
    assert result.stdout == "--- 1 of 2 ---\none more\n--- 2 of 2 ---\n[red]second too\n"


def test_sample_reads_the_prompt_from_standard_input(stream: MagicMock) -> None:
    result = invoke("sample", "dir", "--samples", 2, stdin="two\nlines\n")
    assert result.exit_code == 0, result.output
    assert stream.call_args.args[1] == "two\nlines"
    assert invoke("sample", "dir", stdin="\n").exit_code == 2


def test_sample_streams(stream: MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def pieces(*_: Any, **__: Any) -> Iterator[tuple[int, str]]:
        yield 0, "early"
        assert written == ["early"], "the first piece waited for the second"
        yield 0, " late"

    stream.side_effect = pieces
    monkeypatch.setattr("r1jax.commands.sample.write_model_text", written.append)
    result = invoke("sample", "dir", "--prompt", "x")
    assert result.exit_code == 0, result.exception
    assert written == ["early", " late", "\n"]


def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from r1jax.commands.console import write_model_text

    text = "a\x1b]0;title\x07\tb\n\u2028\u00e9"
    write_model_text(text)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write_model_text(text)
    assert capsys.readouterr().out == text + "a]0;title\tb\n\u00e9"


@pytest.mark.parametrize(
    "setting", [("--top-p", 0), ("--min-p", 1), ("--stop", ""), ("--temperature", -1), ("-n", 0)]
)
def test_sample_refuses_settings_out_of_range(
    stream: MagicMock, setting: tuple[str, object]
) -> None:
    result = invoke("sample", "dir", "--prompt", "x", *setting)
    assert result.exit_code == 2 and "errors.pydantic.dev" not in result.output
    stream.assert_not_called()


# --- score, export, report, configs --------------------------------------------------------------


def test_score_for_real(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    completion = "<think>1+1</think><answer>{}</answer>"
    rows.write_text(
        "".join(
            json.dumps({"prompt": "1+1=", "completion": completion.format(n), "answer": "2"}) + "\n"
            for n in (2, 3)
        )
    )
    out = tmp_path / "out.jsonl"
    result = invoke("score", "--reward", "accuracy", "--in", rows, "--out", out)
    assert result.exit_code == 0, result.output
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["reward"] for row in scored] == [1.0, 0.0]
    assert "right: 1" in result.stdout.lower()
    assert "wrong: 1" in result.stdout.lower()


def test_score_with_options_and_a_function_of_a_file(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    row = {"prompt": "1+1=", "completion": "<think>one and one</think>2", "answer": "2", "level": 3}
    rows.write_text(json.dumps(row) + "\n")
    function = tmp_path / "mine.py"
    function.write_text(
        "def level(completions, level, scale, **columns):\n    return [scale * x for x in level]"
    )

    def scored(reward: str, *options: str) -> dict[str, Any]:
        arguments = [part for option in options for part in ("--option", option)]
        result = invoke("score", "--reward", reward, "--in", rows, "--out", out, *arguments)
        assert result.exit_code == 0, result.stderr
        return dict(json.loads(out.read_text()))

    assert scored("language_consistency", "target=en")["reward"] == 1.0
    assert scored("language_consistency", "target=zh")["reward"] == 0.0
    assert scored("readable", "format.style=think", "length={min_words: 9}")["reward"] == 0.0
    assert scored("format", "style=think")["reward"] == 1.0
    assert scored(f"{function}:level", "scale=0.5")["reward"] == 1.5
    # A number, as in a config; YAML 1.1 takes it for text, which times 3 is an error.
    assert scored(f"{function}:level", "scale=1e-6")["reward"] == 3e-6
    arguments = ("score", "--reward", "format", "--in", rows, "--out", out, "--option")
    for option in ("style", "style=[", "style.a=1", "stile=think"):
        result = invoke(*arguments, option)
        assert result.exit_code == 2 and option[:5] in result.stderr


def test_score_errors_are_messages(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    arguments = ("--in", rows, "--out", tmp_path / "out.jsonl")
    assert str(rows) in invoke("score", "--reward", "accuracy", *arguments).stderr
    rows.write_text('{"prompt": "x"}\n')
    result = invoke("score", "--reward", "accuracy", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{rows}:1")
    assert not (tmp_path / "out.jsonl").exists()
    rows.write_text('{"prompt": "x", "completion": "y", "answer": "z"}\n')
    assert "acuracy" in invoke("score", "--reward", "acuracy", *arguments).stderr


def test_export(run_directory: Path, recipe: Any, replace: Replace, tmp_path: Path) -> None:
    export = replace(recipe, "export_run")
    result = invoke("export", run_directory, tmp_path / "out", "--stage", "rl")
    assert result.exit_code == 0, result.output
    export.assert_called_once_with(run_directory, tmp_path / "out", "rl", None)
    assert invoke("export", run_directory, tmp_path / "out", "--dtype", "fp8").exit_code == 0
    export.assert_called_with(run_directory, tmp_path / "out", None, "fp8")


def test_report(run_directory: Path, replace: Replace) -> None:
    from r1jax.report import page

    write = replace(page, "write_report", return_value=run_directory / "report.html")
    result = invoke("report", run_directory)
    assert result.exit_code == 0, result.output
    write.assert_called_once_with(run_directory)
    assert result.stdout == f"report: {run_directory / 'report.html'}\n"


@pytest.mark.parametrize("command", [("report",), ("export", "out")])
def test_a_directory_that_is_no_run_is_named(tmp_path: Path, command: tuple[str, ...]) -> None:
    result = invoke(command[0], tmp_path, *command[1:])
    assert result.exit_code == 2
    assert result.stderr == f"{tmp_path} is not a run's directory: it has no config.yaml\n"


def test_configs_lists_every_name_with_its_title() -> None:
    lines = invoke("configs").stdout.splitlines()[1:]
    names = packaged_configs()
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert line.split()[0] == name
        assert load_config(name).title in line


def test_configs_prints_one_as_it_is_packaged() -> None:
    assert (
        invoke("configs", "tiny/r1_zero").stdout == packaged_configs()["tiny/r1_zero"].read_text()
    )
    result = invoke("configs", "tiny/r1zero")
    assert result.exit_code == 2 and "did you mean tiny/r1_zero" in result.stderr


def test_explain_says_type_default_meaning_and_other_names() -> None:
    text = invoke("explain", "stages.rl.loss.kl_coefficient").stdout
    assert text.splitlines()[:2] == [
        "stages.NAME.loss.kl_coefficient  (grpo)",
        "  a number; default 0.001",
    ]
    assert "k3 penalty" in text and "TRL: beta; verl: kl_loss_coef, kl_coef, use_kl_loss\n" in text
    assert invoke("explain", "use_kl_loss").stdout == text
    both = invoke("explain", "beta").stdout  # a setting, and TRL's name of another one
    assert both.startswith("stages.NAME.distillation.beta") and both.endswith(text)
    assert invoke("explain", "temprature").exit_code == 2


def test_explain_says_what_a_kind_a_reward_and_a_field_are() -> None:
    text = invoke("explain", "sft").stdout
    assert text.startswith("kind: sft\n  a kind of stage\n  ")
    assert "\nstages.NAME.row_tokens" in text and "\nstages.NAME.optimizer  (" in text
    assert "stages.NAME.optimizer.beta2" not in text and "outputs_per_question" not in text
    text = invoke("explain", "format").stdout
    assert text.startswith("rewards.format\n  a reward\n  1 if the completion is well formed")
    assert "`style`" in text and "Raises" not in text and "\nrewards.NAME.weight" in text
    text = invoke("explain", "response").stdout
    assert text.startswith("response\n  a field of a dataset's rows\n")
    assert "\ndata.NAME.fields\n" in text


def test_help_waits_for_no_heavy_import() -> None:
    program = (
        "import sys; from r1jax.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "print(sys.modules.keys() & {'jax', 'numpy', 'transformers', 'pydantic'})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "set()", run.stderr


def read_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """(exit status, standard error) of a command line before the commands are imported."""

    def commands() -> None:
        raise SystemExit(0)

    monkeypatch.setattr("r1jax.cli.app", commands)
    monkeypatch.setattr(sys, "argv", ["r1jax", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert gc.isenabled() == (stopped.value.code == 0)
    gc.enable()
    return int(str(stopped.value.code)), capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "CONFIG", "sead=1"],
        ["run", "--from", "first", "CONFIG", "--dry-run", "seed=x", "name=..", "--until=last"],
        ["run", "CONFIG", "--slice", "v5p:2x2x1"],
        ["run", "CONFIG", "--slice=v5p:2x2x1", "--profile-steps", "1:2"],
        ["run", "nothing/here", "--only", "first"],
    ],
)
def test_a_mistake_is_the_same_message_before_the_commands_are_imported(
    config: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [argument.replace("CONFIG", str(config)) for argument in arguments]
    late = invoke(*arguments)
    assert late.exit_code == 2 and late.stderr
    assert read_first(monkeypatch, capsys, *arguments) == (2, late.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "CONFIG", "seed=1", "--slice"],  # is said by the command
        ["run", "CONFIG", "sead=1", "--dry"],
        ["run", "CONFIG", "sead=1", "--help"],
        ["run"],
        ["plan", "CONFIG", "sead=1"],
        ["run", "CONFIG", "--from", "first", "seed=1"],
    ],
)
def test_other_command_lines_are_left_to_the_commands(
    config: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [argument.replace("CONFIG", str(config)) for argument in arguments]
    assert read_first(monkeypatch, capsys, *arguments) == (0, "")


def test_an_option_of_run_is_known_before_the_commands_are_imported() -> None:
    parameters = typer.main.get_command(app).commands["run"].params  # type: ignore[attr-defined]
    options = {name: each for each in parameters for name in each.opts if name.startswith("--")}
    assert {name for name, each in options.items() if each.is_flag} == set(FLAGS)
    assert {name for name, each in options.items() if not each.is_flag} == set(OPTIONS)
