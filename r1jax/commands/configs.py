"""`r1jax configs` and `explain`: which configs there are, and what their keys mean."""

from __future__ import annotations

from typing import Annotated

import typer

from r1jax.commands.console import make_console


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
    make_console().print(table)


def explain(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="Whole or its end, such as stages.rl.loss.clip_low, loss or clip_low; what TRL, "
            "tunix or verl call it; or a kind of stage (sft), a reward (accuracy), a field of a "
            "row (response).",
        ),
    ],
) -> None:
    """Say what a config's key, kind of stage, reward or field of a row means."""
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
