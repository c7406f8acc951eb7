"""The command line: `r1jax run tiny/r1_zero seed=1`.

Imports are inside the functions, so that `--help` and a mistake in a config do not wait for JAX.
Mistakes of the user (a `ConfigError`, a missing file, a value refused with a reason) are one red
message and exit status 2; a run that gives up with advice is one with status 1. R1JAX_DEBUG=1 shows
the traceback instead. After 143 (SIGTERM: saved) and 134 (another process of the run is lost) the
same command goes on from the last checkpoint; tpu_scripts/ give it again. After 130 (Ctrl-C: saved,
or left at once by a second one) it does, too.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console

    from r1jax.config.run_config import RunConfig
    from r1jax.files import JsonObject


class _Commands(TyperGroup):
    """Prints the user's mistakes as messages."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise  # `r1jax configs | head`: nobody is left to read a message.
        except Exception as error:
            # The package's own errors are worded for users; another library's RuntimeError, such
            # as XLA's, needs its traceback.
            ours = type(error).__module__.startswith("r1jax.")
            failed = isinstance(error, RuntimeError)
            # Python's import errors have a name; those that ask for an extra are only text.
            broken = isinstance(error, ImportError) and error.name is not None
            worded = isinstance(error, ValueError | OSError | ImportError) or (failed and ours)
            process = _process()
            prefix = "" if process is None else f"[process {process}] "
            if os.environ.get("R1JAX_DEBUG") == "1" or broken or not worded:
                if prefix:  # whose traceback it is
                    typer.secho(f"{prefix}failed:", fg=typer.colors.RED, err=True)
                raise
            _print_error(error, prefix, with_place=not ours)
            raise typer.Exit(1 if failed else 2) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The DeepSeek-R1 recipe in JAX: train, evaluate and sample models that reason.",
)

ConfigName: TypeAlias = Annotated[
    str, typer.Argument(help="A YAML file, or a name that `configs` lists.")
]


def _directories(
    parameter: typer.CallbackParam, given: str | list[str] | None
) -> str | list[str] | None:
    """Raises ConfigError, with the argument's name, for a bucket that cannot be read."""
    from r1jax.bucket import check_readable
    from r1jax.config.load import ConfigError

    for path in [given] if isinstance(given, str) else given or ():
        try:
            check_readable(path)
        except (ValueError, ImportError) as error:
            raise ConfigError([f"{_shown(parameter)} {path}: {error}"]) from error
    return given


def _local_file(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
    """Raises ConfigError, with the option's name, for a URL."""
    from r1jax.config.load import ConfigError

    if path is not None and re.match(r"[a-z][a-z0-9]+:/", str(path)):
        problem = "only a local file; copy it to or from the bucket"
        raise ConfigError([f"{_shown(parameter)} {path}: {problem}"])
    return path


def _shown(parameter: typer.CallbackParam) -> str:
    """What a user calls an option or argument."""
    name = parameter.opts[0]
    return name if name.startswith("-") else (parameter.metavar or name.upper()).rstrip(".")


Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        help="A run's directory (its last weights; RUN_DIR@STEP or RUN_DIR@STAGE:STEP: a kept "
        "checkpoint), a Hugging Face directory or a hub name.",
        callback=_directories,
    ),
]
_SLICE = "A TPU slice, v5p:4x4x8 or v5p-256, with the config's settings for it."
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Changes to the config, such as seed=1 or stages.rl.optimizer.learning_rate=1e-6.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("r1jax"))
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


@app.command()
def run(
    config: ConfigName,
    overrides: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", help="The first stage to run.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="The last stage to run.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="The one stage to run.")] = None,
    restart: Annotated[
        list[str] | None,
        typer.Option(
            "--restart",
            metavar="STAGE",
            help="Remove what this stage has written and run it from its start; may be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved config, parameters, shardings and memory; run nothing.",
        ),
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile-steps",
            metavar="[STAGE:]FIRST:LAST",
            help="Trace these optimizer steps, both included and counted from 1, of every train "
            "stage that gets there, or of STAGE; with the rollout that feeds them, and on process "
            "0. XProf and TensorBoard show what is in the stage's folder profile/.",
        ),
    ] = None,
    slice_name: Annotated[str | None, typer.Option("--slice", help=_SLICE)] = None,
) -> None:
    """Run a config's stages; the same command again resumes a run that was stopped."""
    from r1jax.config.load import load_config

    settings = load_config(config, overrides or (), slice_name)

    from r1jax import recipe
    from r1jax.metrics.profiling import ProfiledSteps
    from r1jax.processes import join_processes
    from r1jax.run.selection import Selection

    profiled = None if profile is None else ProfiledSteps.parse(profile)
    selection = Selection(only, first, last, tuple(restart or ()))
    join_processes()
    if dry_run:
        selection.stages(settings)  # refuses names that are not there
        _print_dry_run(settings, slice_name if _process() is None else None)
        return
    raise typer.Exit(recipe.run(settings, selection, profiled))


@app.command()
def plan(
    config: ConfigName,
    overrides: Overrides = None,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", help=f"{_SLICE} May be repeated."),
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="A TPU slice with the config as it is, without settings for it; may be repeated."
        ),
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(
            help="How to arrange its devices: fsdp=8,tensor=4, a name in configs/mesh, or an axis "
            "for all of them; may be repeated. Default: the config's."
        ),
    ] = None,
    fake: Annotated[
        int | None,
        typer.Option(
            "--fake-devices",
            min=1,
            help="Plan for this many devices that the CPU stands in for: without times.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A stage to plan; may be repeated. Default: all.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Compile with the least effort: up to four times as fast; memory and times come "
            "out within a few percent.",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also run each program, with placeholder arguments: on this machine's devices, or "
            "on fake ones.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything to this file.", callback=_local_file),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compile nothing: check config, mesh and batches, and estimate the memory. Needs "
            "no TPU compiler.",
        ),
    ] = False,
) -> None:
    """Compile a run's programs for a slice; print their memory, work, traffic and time.

    Needs no accelerator, weights or data. Times are those of a perfect machine. The exit status is
    1 where nothing fits.
    """
    from r1jax.config.load import ConfigError, load_config

    if bool(slices) + bool(topology) + (fake is not None) > 1:
        raise ConfigError(["--slice, --topology and --fake-devices: give one of them"])
    if measure and (slices or topology):
        raise ConfigError(["--measure needs devices that are there: give no --slice or --topology"])
    shaped = _with_given_shapes(overrides or ())
    slice_names: Sequence[str | None] = slices or [None]
    settings = [load_config(config, shaped, name) for name in slice_names]

    from r1jax.config.slices import slice_name
    from r1jax.planner.check import check_slice, slice_or_stand_ins
    from r1jax.planner.plan import Case, PlanOptions, parse_mesh, plan_case
    from r1jax.planner.report import as_json, print_plans
    from r1jax.planner.topologies import attached, fake_devices, tpu_slice

    if fake is not None:
        targets = [fake_devices(fake)]
    else:
        find, names = slice_or_stand_ins if check else tpu_slice, slices or topology or ()
        targets = [find(slice_name(name)) for name in names] or [attached()]
    # A config for each slice, or one for all.
    pairs = zip(settings if slices else settings * len(targets), targets, strict=True)
    cases = [
        Case(each, target, parse_mesh(text, each.mesh))
        for each, target in pairs
        for text in mesh or ["config"]
    ]
    if check:
        for case in cases:
            typer.echo("\n".join(check_slice(case, only)))
        return
    console = _console()
    with console.status("planning") as status:
        options = PlanOptions(only, quick=quick, measure=measure, progress=status.update)
        plans = [plan_case(case, options) for case in cases]
    if all(each.refused for each in plans):
        raise ValueError("\n".join(dict.fromkeys(each.refused for each in plans)))
    print_plans(plans, console)
    if out is not None:
        out.write_text(json.dumps(as_json(config, plans), indent=2) + "\n")
    if not any(each.fits for each in plans):
        raise typer.Exit(1)


@app.command(hidden=True, context_settings={"ignore_unknown_options": True})
def on_slice(accelerator: str, words: list[str]) -> None:
    """Check `r1jax run WORDS` for a slice, as tpu_scripts/ do before they create one.

    ACCELERATOR: of Cloud, such as v6e-64 or 2xv6e-64. Prints `--slice` and its name, a line each,
    where the config has settings for the slice.
    """
    from r1jax.config.load import ConfigError, load_config, slices_of
    from r1jax.config.packaged import find_config
    from r1jax.config.slices import slice_name

    parsed = typer.main.get_command(app).commands["run"].make_context("run", list(words)).params  # type: ignore[attr-defined]
    config, given, name = parsed["config"], parsed["slice_name"], slice_name(accelerator)
    if config.startswith("gs://"):
        try:
            find_config(config)
        except Exception as error:  # the packages, or the right to read, may be the slice's alone
            typer.echo(f"{config} cannot be read here, and is not checked: {error}", err=True)
            return
    known = {slice_name(each): each for each in slices_of(config)}
    if given is not None and slice_name(given) in known and slice_name(given) != name:
        raise ConfigError([f"--slice {given}: the slice of these scripts is {name}"])
    chosen = known.get(name) if given is None else given
    settings = load_config(config, parsed["overrides"] or (), chosen)
    _check_files_beside(config, settings)

    from r1jax.planner.check import check_slice, slice_or_stand_ins
    from r1jax.planner.plan import Case
    from r1jax.planner.topologies import is_slice
    from r1jax.run.selection import Selection

    restart = tuple(parsed["restart"] or ())
    selection = Selection(parsed["only"], parsed["first"], parsed["last"], restart)
    stages = selection.stages(settings)
    if is_slice(name):
        case = Case(settings, slice_or_stand_ins(name), settings.mesh)
        typer.echo("\n".join(check_slice(case, stages)), err=True)
    else:
        unknown = "the planner does not know this slice: mesh, batches and memory are not checked"
        typer.echo(f"{accelerator}: {unknown}", err=True)
    if given is None and chosen is not None:
        typer.echo(f"--slice\n{chosen}")


def _check_files_beside(config: str, settings: RunConfig) -> None:
    """Raises ConfigError for files beside a config, which the machines of a slice do not have."""
    from r1jax.config.load import ConfigError
    from r1jax.config.yaml_file import read_yaml

    path = Path(config)
    if not path.is_file():
        return
    missing = [name for name in settings.rewards if ".py:" in name]
    missing += [str(e.function) for e in settings.rewards.values() if ".py:" in str(e.function)]
    problems = [
        f"{config}: rewards.{name}: only the config is copied to the slice; put the function into "
        "a package that is installed there, and name it as package.module:function"
        for name in missing
    ]
    data = read_yaml(path.read_text(encoding="utf-8")).data
    base = data.get("base") if isinstance(data, dict) else None
    if base is not None and Path(str(base)).is_file():
        problems.append(
            f"{config}: base = {base}: only the config itself is copied to the slice; put both on "
            "the bucket, or base it on a packaged config"
        )
    if problems:
        raise ConfigError(problems)


@app.command()
def plan_all(
    configs: Annotated[
        list[str] | None,
        typer.Argument(help="Configs with slices. Default: all that come with r1jax."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the table to this file, after each slice.", callback=_local_file),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is compiled for later calls.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no slice after this many.")
    ] = None,
) -> None:
    """Plan configs on every slice that they have settings for, quickly, as one Markdown table.

    The exit status is 1 where something does not fit.
    """
    from r1jax.config.load import load_config, slices_of
    from r1jax.config.packaged import packaged_configs
    from r1jax.planner.plan import Case, Plan, PlanOptions, distinct_stages, plan_case
    from r1jax.planner.report import as_markdown, has_margin
    from r1jax.planner.topologies import tpu_slice

    names = configs or [name for name in packaged_configs() if slices_of(name)]
    waiting = [(name, slice_name) for name in names for slice_name in slices_of(name)]
    if not waiting:
        raise ValueError(f"{', '.join(names)}: no config has settings for `slices`")
    until = None if minutes is None else time.monotonic() + 60 * minutes
    planned: list[tuple[str, Plan]] = []
    console = _console()
    with console.status("planning") as status:
        while waiting and (until is None or time.monotonic() < until):
            name, slice_name = waiting.pop(0)
            settings = load_config(name, (), slice_name)
            options = PlanOptions(
                distinct_stages(settings),
                quick=True,
                cache=cache,
                progress=lambda line, name=name: status.update(f"{name}: {line}"),  # type: ignore[misc]
            )
            case = Case(settings, tpu_slice(slice_name), settings.mesh)
            planned.append((name, plan_case(case, options)))
            if out is not None:
                out.write_text(as_markdown(planned, waiting), encoding="utf-8")
    if out is None:
        table = as_markdown(planned, waiting)
        console.print(table, markup=False, highlight=False, soft_wrap=True)
    if not all(has_margin(each) for _, each in planned):
        raise typer.Exit(1)


@app.command(name="eval")
def evaluate(
    model: Model,
    overrides: Overrides = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help="A benchmark with the paper's protocol, such as aime_2024 or math_500; may be "
            "repeated. No config is needed."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Where data, rewards and the stage are described; default: the run's."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Which evaluate stage; default: the config's last.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for the evaluation's own run directory; default: RUN_DIR/evaluations, or "
            "the config's output."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As of `run`.")] = False,
) -> None:
    """Evaluate a model, or a run's final weights: on benchmarks, or as a config's stage does.

    The same command again resumes. Leaves results.json, and every sample of each stage.
    """
    from r1jax.bucket import locate
    from r1jax.config.load import ConfigError, load_config, parse_config
    from r1jax.evaluation.run_directory import split_reference
    from r1jax.stages.evaluate.settings import evaluation_of

    directory, _ = split_reference(model)
    recorded = None if directory is None else directory / "config.yaml"
    if benchmark and (config is not None or stage is not None):
        raise ConfigError(["--benchmark needs no config: give it without --config and --stage"])
    found = None
    if directory is not None:
        from r1jax.run.checkpointed import find_model

        found = find_model(model)
    weights = model if found is None else found.path
    if benchmark:
        document = evaluation_of(weights, (directory or locate(model)).resolve().name, benchmark)
        settings = parse_config(json.dumps(document), "r1jax eval", overrides or ())
    elif described := config or recorded:
        settings = load_config(described, overrides or ())
    else:
        needed = "say how to evaluate it with --benchmark NAME or --config FILE"
        raise ConfigError([f"{model} is not a run's directory: {needed}"])

    from r1jax import recipe
    from r1jax.processes import join_processes

    join_processes()
    if directory is not None:
        settings = settings.model_copy(update={"output": str(directory / "evaluations")})
    if out is not None:
        settings = settings.with_output(out, "--out")
    if not benchmark:
        settings = recipe.evaluation_config(settings, weights, stage)
    if found is not None and found.step is not None:
        named = {"name": f"{settings.name}-{found.stage}-{found.step}"}
        settings = settings.model_copy(update=named)
    settings = settings.model_copy(update={"name": recipe.free_name(settings, weights)})
    if dry_run:
        _print_dry_run(settings)
        return
    code = recipe.run(settings)
    if code == 0 and not _process():
        directory = locate(settings.output) / f"{settings.name}-s{settings.seed}"
        for each in settings.stages:
            (summary,) = directory.glob(f"stages/[0-9][0-9]-{each.name}/summary.json")
            _print_summary(each.name, json.loads(summary.read_text(encoding="utf-8")))
        typer.echo(f"results: {directory / 'results.json'}")
    raise typer.Exit(code)


@app.command()
def sample(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Default: read from standard input.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Completions; the first is streamed.")
    ] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Default: 1024, or fewer where the model's positions end."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="0: off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0: off; below 1.")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends a completion; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    template: Annotated[
        Literal["chat", "r1_zero", "plain"],
        typer.Option(help="chat: the tokenizer's own. plain: for base models."),
    ] = "chat",
    speculative: Annotated[
        bool, typer.Option(help="Draft with the model's module for multi-token prediction: faster.")
    ] = False,
) -> None:
    """Print a model's completions of a prompt as they are made."""
    prompt = _prompt_of(prompt)

    from pydantic import ValidationError

    from r1jax.config.load import ConfigError
    from r1jax.settings.sampling import SamplingSection

    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    try:
        sampling = SamplingSection(**given, stop=stop or [], speculative=speculative)
    except ValidationError as error:
        raise ConfigError(
            [
                f"--{str(each['loc'][0]).replace('_', '-')} = {each['input']!r}: "
                + each["msg"].removeprefix("Input ").removeprefix("String ")
                for each in error.errors()
            ]
        ) from None
    from r1jax.pretrained import stream_completions

    rest = [""] * samples
    _heading(0, samples)
    for index, text in stream_completions(
        model, prompt, sampling, samples, max_new_tokens, seed, template
    ):
        # Several streams at once cannot be read; the others are kept until the first is over.
        if index == 0:
            _write(text)
        else:
            rest[index] += text
    _write("\n")
    for index in range(1, samples):
        _heading(index, samples)
        _write(rest[index] + "\n")


@app.command()
def search(
    model: Model,
    overrides: Overrides = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Default: read from standard input.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Where the search is described; default: the run's.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Which stage with search; default: the config's last.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A file of JSON lines, to which the tree is added; default: searches.jsonl in the "
            "run's directory, or beside the caller.",
            callback=_local_file,
        ),
    ] = None,
) -> None:
    """Search the solution of a prompt as a config's stage does, print it and keep the tree."""
    from r1jax.config.load import ConfigError, load_config
    from r1jax.evaluation.run_directory import split_reference

    directory, _ = split_reference(model)
    described = config or (None if directory is None else directory / "config.yaml")
    if described is None:
        needed = "say with --config FILE how to search"
        raise ConfigError([f"{model} is not a run's directory: {needed}"])
    settings = load_config(described, overrides or ())
    prompt = _prompt_of(prompt)

    from r1jax import recipe
    from r1jax.files import encode_line
    from r1jax.run.checkpointed import find_model

    settings, chosen = recipe.search_config(settings, find_model(model).path, stage)
    text, tree = recipe.search_prompt(settings, chosen, prompt, directory)
    _write(text + "\n")
    out = out or (directory or Path()) / "searches.jsonl"
    with out.open("ab") as file:
        file.write(encode_line(tree))
    node = tree["nodes"][tree["solutions"][0]]
    value = node["mean_value"] if node["value"] is None else node["value"]
    line = f"{node['state']}, value {value}; {tree['generated_tokens']} tokens generated, "
    line += f"{len(tree['nodes']) - 1} steps; the tree is added to {out}"
    typer.secho(line, dim=True, err=True)


@app.command()
def score(
    reward: Annotated[
        str, typer.Option(help="A registered name, package.module:function or file.py:function.")
    ],
    source: Annotated[
        Path,
        typer.Option(
            "--in", help="JSON lines with prompt, completion and answer.", callback=_local_file
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--out", help="The rows with reward, outcome and extracted added.", callback=_local_file
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the reward, such as style=boxed or format.style=think; the value is "
            "YAML. May be repeated.",
        ),
    ] = None,
) -> None:
    """Score a file of completions with a reward function."""
    from r1jax.rewards import score_file

    counts = score_file(reward, source, target, options=_options_of(option or ()))
    typer.echo(", ".join(f"{outcome}: {count}" for outcome, count in counts.items()))


@app.command()
def export(
    run_directory: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR",
            help="Or RUN_DIR@STEP, RUN_DIR@STAGE:STEP.",
            callback=_directories,
        ),
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A new directory.", callback=_directories)
    ],
    stage: Annotated[
        str | None, typer.Option(help="Weights as this stage left them; default: the last.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "fp8"] | None,
        typer.Option(
            help="Of the weights; fp8: as DeepSeek-V3 is released, in blocks of 128 x 128. "
            "Default: as they were trained."
        ),
    ] = None,
) -> None:
    """Write a run's weights and tokenizer as a Hugging Face directory."""
    from r1jax.bucket import locate

    _require_run(locate(run_directory), checkpoints=True)
    from r1jax import recipe

    recipe.export_run(locate(run_directory), locate(destination), stage, dtype)
    typer.echo(f"exported: {destination}")


@app.command()
def report(
    run_directories: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR...", callback=_directories)
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for report.html, tables.md and results.json over seeds, which need it; or "
            "for compare.html, by default the first run's directory.",
            callback=_directories,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Put runs of any configs side by side.")
    ] = False,
) -> None:
    """Write report.html of a run, finished or not; of finished runs that differ in seed; or, with
    --compare, compare.html of runs side by side."""
    from contextlib import ExitStack

    from r1jax.bucket import local_copy, locate, on_bucket
    from r1jax.config.load import ConfigError

    for directory in run_directories:
        _require_run(locate(directory))
    if out is None and len(run_directories) > 1 and not compare:
        needed = "say with --out DIR where their common report goes, or --compare; or give one run,"
        raise ConfigError([f"{len(run_directories)} runs: {needed} for the report inside it"])
    from r1jax.report.page import write_report
    from r1jax.report.seeds import write_seeds_report
    from r1jax.report.side_by_side import write_side_by_side

    with ExitStack() as copies:
        directories = [copies.enter_context(local_copy(each)) for each in run_directories]
        if compare:
            folder = directories[0] if out is None else copies.enter_context(local_copy(out))
            written = [write_side_by_side(directories, folder)]
        elif out is None:
            written = [write_report(directories[0])]
        else:
            written = write_seeds_report(directories, copies.enter_context(local_copy(out)))
        home = locate(out or run_directories[0])
        for path in written:
            typer.echo(f"{path.stem}: {(home if on_bucket(home) else home.resolve()) / path.name}")


@app.command()
def configs(
    name: Annotated[
        str | None, typer.Argument(help="A config: print it. Default: list all.")
    ] = None,
) -> None:
    """List the configs that come with r1jax; or print one, `r1jax configs NAME > my.yaml`."""
    from rich.table import Table

    from r1jax.config.load import load_config
    from r1jax.config.packaged import find_config, packaged_configs

    if name is not None:
        typer.echo(find_config(name).read_text(encoding="utf-8"), nl=False)
        return
    table = Table("config", "title", box=None)
    for each, path in packaged_configs().items():
        table.add_row(each, load_config(path).title)
    _console().print(table)


@app.command()
def explain(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="Whole or its end, such as stages.rl.loss.clip_low, loss or clip_low; or what "
            "TRL, tunix or verl call it.",
        ),
    ],
) -> None:
    """Say what a config's key means: its type, default, and names in TRL, tunix and verl."""
    from r1jax.config import reference

    for index, each in enumerate(reference.explain(key)):
        kinds = f"  ({', '.join(each.kinds)})" if each.kinds else ""
        default = {"": "", "required": "; required"}.get(each.default, f"; default {each.default}")
        typer.secho(f"{chr(10) if index else ''}{each.key}", bold=True, nl=False)
        typer.echo(f"{kinds}\n  {each.type}{default}")
        typer.echo(f"  {each.meaning}")
        if others := reference.other_names_of(each.key):
            libraries = (f"{library}: {', '.join(names)}" for library, names in others.items())
            typer.echo(f"  {'; '.join(libraries)}")


def _process() -> int | None:
    """Which of several processes this is, once they have joined; None: it is the only one."""
    if "r1jax.processes" not in sys.modules:  # a mistake that was found before JAX was needed
        return None
    from r1jax.processes import distributed_process

    process = distributed_process()
    return None if process is None else process.index


def _print_error(error: Exception, prefix: str, with_place: bool) -> None:
    """The message, and for errors that may be a fault of r1jax, where it was raised."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    typer.secho(prefix + text, fg=typer.colors.RED, err=True)
    package = f"{Path(__file__).parent}{os.sep}"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(package)]
    if inside and with_place:
        place = f"{inside[-1].filename}:{inside[-1].lineno}"
        typer.secho(f"({place}; R1JAX_DEBUG=1 shows the traceback)", dim=True, err=True)


def _with_given_shapes(overrides: Sequence[str]) -> list[str]:
    """Overrides for a plan: a model's `config` takes the place of its `path`.

    So that a config of a model that cannot be reached is planned with its shape. Weights and
    tokenizer are not looked at.
    """
    shapes = [re.match(r"(model|models\..+)\.config=", override) for override in overrides]
    models = [shape[1] for shape in shapes if shape is not None]
    resets = ("path=null", "tokenizer=none")
    return [*overrides, *(f"{model}.{reset}" for model in models for reset in resets)]


def _options_of(given: Sequence[str]) -> JsonObject:
    """`a.b=VALUE` each, as a tree."""
    from r1jax.config.load import ConfigError
    from r1jax.config.yaml_file import read_yaml

    options: JsonObject = {}
    for text in given:
        key, equals, value = text.partition("=")
        *path, last = key.split(".")
        node = options
        for name in path:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError([f"--option {text}: {name} has a value already"])
        if not (key and equals):
            raise ConfigError([f"--option {text}: needs KEY=VALUE"])
        file = read_yaml(value)
        if file.problems:
            raise ConfigError([f"--option {text}: {file.problems[0][1]}"])
        node[last] = file.data
    return options


def _require_run(directory: Path, *, checkpoints: bool = False) -> None:
    from r1jax.config.load import ConfigError
    from r1jax.evaluation.run_directory import split_reference

    is_run = (directory / "config.yaml").is_file()
    if not is_run and not (checkpoints and split_reference(str(directory))[0]):
        raise ConfigError([f"{directory} is not a run's directory: it has no config.yaml"])


def _prompt_of(given: str | None) -> str:
    """A prompt that was given, or that is read from standard input."""
    if given is None:
        if sys.stdin.isatty():
            typer.secho("prompt, then Ctrl-D:", dim=True, err=True)
        given = sys.stdin.read().rstrip("\n")
    if not given:
        raise ValueError("the prompt is empty: give --prompt TEXT or text on standard input")
    return given


def _heading(index: int, samples: int) -> None:
    if samples > 1:
        typer.secho(f"--- {index + 1} of {samples} ---", dim=True)


def _write(text: str) -> None:
    """Model text, at once. A terminal gets no control characters from a model."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or c.isprintable())
    sys.stdout.write(text)
    sys.stdout.flush()


def _console() -> Console:
    from rich.console import Console

    # Not cut to 80 columns when read by another program.
    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False)


def _print_dry_run(config: RunConfig, slice_given: str | None = None) -> None:
    """The config, devices (of a slice, if one is given), each weight, and the memory estimate."""
    from rich.table import Table

    from r1jax.config.load import ConfigError, dump_config
    from r1jax.config.slices import slice_name
    from r1jax.planner.check import slice_or_stand_ins
    from r1jax.planner.dry_run import describe
    from r1jax.planner.topologies import is_slice

    target = None
    if slice_given is not None and is_slice(slice_name(slice_given)):
        target = slice_or_stand_ins(slice_name(slice_given))
    description = describe(config, target)
    if _process():
        return
    typer.echo(dump_config(config))
    typer.echo(f"devices: {description['devices']}")
    typer.echo(f"parameters: {description['parameters']:,}")
    weights = Table("weight", "shape", "dtype", "sharding", box=None)
    weights.add_column("bytes per device", justify="right")
    for weight in description["weights"]:
        shape = " x ".join(map(str, weight["shape"]))
        weights.add_row(
            weight["name"], shape, weight["dtype"], str(weight["sharding"]), _size(weight["bytes"])
        )
    memory = Table("memory per device", box=None)
    memory.add_column("bytes", justify="right")
    for entry in description["memory"]:
        memory.add_row(entry["what"], _size(entry["bytes"]))
    for table in (weights, memory):
        _console().print(table, markup=False)
    for note in description["notes"]:
        typer.echo(note)
    if description.get("too_large"):
        raise ConfigError(description["too_large"])


def _print_summary(stage: str, summary: JsonObject) -> None:
    """Estimates with their 95 % intervals, then the plain figures."""
    from rich.table import Table

    table = Table(stage, box=None)
    table.add_column("value", justify="right")
    table.add_column("95 % interval")
    for name, figure in summary.items():
        if isinstance(figure, Mapping) and {"value", "low", "high"} <= set(figure):
            interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
            table.add_row(name, f"{figure['value']:.3f}", interval)
        elif isinstance(figure, int | float | str):
            table.add_row(name, str(figure), "")
    _console().print(table, markup=False)


def _size(count: int) -> str:
    """Bytes for people, in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
