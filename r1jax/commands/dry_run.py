"""`--dry-run`: what a run would be, and what it would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from r1jax.commands.console import make_console, process_index

if TYPE_CHECKING:
    from r1jax.config.run_config import RunConfig


def print_dry_run(config: RunConfig, slice_given: str | None = None) -> None:
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
    if process_index():
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
        make_console().print(table, markup=False)
    for note in description["notes"]:
        typer.echo(note)
    if description.get("too_large"):
        raise ConfigError(description["too_large"])


def _size(count: int) -> str:
    """Bytes for people, in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
