"""`r1jax eval`: a model, or the weights of a run, on benchmarks or as a config's stage says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from r1jax.commands.arguments import Model, Overrides, Restart
from r1jax.commands.console import make_console, process_index
from r1jax.commands.dry_run import print_dry_run

if TYPE_CHECKING:
    from r1jax.files import JsonObject


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
    restart: Restart = None,
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
    from r1jax.run.selection import Selection

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
    selection = Selection(restart=tuple(restart or ()))
    if dry_run:
        print_dry_run(settings, selection=selection)
        return
    code = recipe.run(settings, selection)
    if code == 0 and not process_index():
        directory = locate(settings.output) / f"{settings.name}-s{settings.seed}"
        for each in settings.stages:
            (summary,) = directory.glob(f"stages/[0-9][0-9]-{each.name}/summary.json")
            _print_summary(each.name, json.loads(summary.read_text(encoding="utf-8")))
        typer.echo(f"results: {directory / 'results.json'}")
    raise typer.Exit(code)


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
    make_console().print(table, markup=False)
