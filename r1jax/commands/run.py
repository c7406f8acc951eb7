"""`r1jax run`: the stages of a config."""

from __future__ import annotations

from typing import Annotated

import typer

from r1jax.commands.arguments import SLICE_HELP, ConfigName, Overrides, Restart
from r1jax.commands.console import process_index
from r1jax.commands.dry_run import print_dry_run


def run(
    config: ConfigName,
    overrides: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", help="The first stage to run.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="The last stage to run.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="The one stage to run.")] = None,
    restart: Restart = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved config, and parameters, shardings and memory of the stages "
            "that would run; refuse what a run would; run nothing.",
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
    slice_name: Annotated[str | None, typer.Option("--slice", help=SLICE_HELP)] = None,
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
        target = slice_name if process_index() is None else None
        print_dry_run(settings, target, selection, profiled)
        return
    raise typer.Exit(recipe.run(settings, selection, profiled))
