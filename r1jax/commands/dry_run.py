"""`--dry-run`: what a run would be, and what it would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from r1jax.commands.console import make_console, process_index

if TYPE_CHECKING:
    from r1jax.config.run_config import RunConfig
    from r1jax.files import JsonObject
    from r1jax.metrics.profiling import ProfiledSteps
    from r1jax.run.selection import Selection


def print_dry_run(
    config: RunConfig,
    slice_given: str | None = None,
    selection: Selection | None = None,
    profile: ProfiledSteps | None = None,
) -> None:
    """The config, devices (of a slice, if one is given), each weight, and the memory estimate; then
    that nothing is wrong.

    Raises ValueError for what a run of the selected stages (default: all) would refuse.
    """
    from r1jax import recipe
    from r1jax.bucket import on_bucket
    from r1jax.config.load import ConfigError, dump_config
    from r1jax.config.slices import slice_name
    from r1jax.planner.check import slice_or_stand_ins
    from r1jax.planner.dry_run import describe
    from r1jax.planner.topologies import is_slice
    from r1jax.run.selection import EVERYTHING

    selection = selection or EVERYTHING
    names = selection.stages(config)
    stages = [stage for stage in config.stages if stage.name in names]
    target = None
    if slice_given is not None and is_slice(slice_name(slice_given)):
        target = slice_or_stand_ins(slice_name(slice_given))
    if on_bucket(config.output):  # which is read once it is known to be accessible
        description = describe(config, target, stages)
        stages = recipe.review(config, selection, profile)
    else:
        if target is None:  # a slice that is not there has another disk
            stages = recipe.review(config, selection, profile)
        description = describe(config, target, stages)
    if process_index():
        return
    typer.echo(dump_config(config))
    typer.echo(f"devices: {description['devices']}")
    if stages:
        _print_tables(description)
    for note in description["notes"]:
        typer.echo(note)
    if description.get("too_large"):
        raise ConfigError(description["too_large"])
    typer.echo(_verdict([stage.name for stage in stages], names, description))


def _print_tables(description: JsonObject) -> None:
    from rich.table import Table

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
        make_console().print(table, markup=False)


def _verdict(left: Sequence[str], selected: Sequence[str], description: JsonObject) -> str:
    """The last line of a dry run that found nothing wrong."""
    from r1jax.report.wording import plural

    if not left:
        finished = ", ".join(selected)
        return f"Nothing to refuse, and nothing to run: {finished} finished before."
    text = f"Nothing to refuse: {plural(len(left), 'stage')} to run ({', '.join(left)})"
    if done := [name for name in selected if name not in left]:
        text += f", {plural(len(done), 'stage')} finished before ({', '.join(done)})"
    if fullest := description.get("fullest"):
        free = description.get("free")
        of = "" if free is None else f" of {_size(free)}"
        text += f"; by estimate the fullest program, {fullest['what']}, needs "
        text += f"{_size(fullest['bytes'])}{of} on each device"
    return f"{text}. The same command without --dry-run runs it."


def _size(count: int) -> str:
    """Bytes for people, in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
