"""`r1jax report`: pages about a run, about seeds, and of runs side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from r1jax.commands.arguments import check_directories, require_run


def report(
    run_directories: Annotated[
        list[str], typer.Argument(metavar="RUN_DIR...", callback=check_directories)
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder for report.html, tables.md and results.json over seeds, which need it; or "
            "for compare.html, by default the first run's directory.",
            callback=check_directories,
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
        require_run(locate(directory))
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
