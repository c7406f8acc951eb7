"""`r1jax on-slice`: what tpu_scripts/ ask before they create a slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

if TYPE_CHECKING:
    from typer.core import TyperGroup

    from r1jax.config.run_config import RunConfig

_Entry = TypeVar("_Entry")


def on_slice(ctx: typer.Context, accelerator: str, words: list[str]) -> None:
    """Check `r1jax run WORDS` for a slice, as tpu_scripts/ do before they create one.

    ACCELERATOR: of Cloud, such as v6e-64 or 2xv6e-64. Prints `--slice` and its name, a line each,
    where the config has settings for the slice.
    """
    from r1jax.config.load import ConfigError, load_config, slices_of
    from r1jax.config.packaged import find_config
    from r1jax.config.slices import slice_name

    commands: TyperGroup = ctx.find_root().command  # type: ignore[assignment]
    parsed = commands.commands["run"].make_context("run", list(words)).params
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
    _check_files_here(config, settings)

    from r1jax.planner.check import check_slice, slice_or_stand_ins
    from r1jax.planner.plan import Case
    from r1jax.planner.topologies import is_slice
    from r1jax.run.selection import Selection

    restart = tuple(parsed["restart"] or ())
    selection = Selection(parsed["only"], parsed["first"], parsed["last"], restart)
    stages = selection.stages(settings)
    if known and chosen is None:
        others = ", ".join(known.values())
        typer.echo(f"{config} has no settings for {name}; it has some for {others}", err=True)
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


def _check_files_here(config: str, settings: RunConfig) -> None:
    """Models and data of this machine's disk, which the machines of a slice read from theirs.

    Raises ConfigError for relative paths, which no directory there makes right. An absolute one may
    be mounted on both: it is printed.
    """
    from r1jax.config.load import ConfigError

    given: dict[str, str | None] = {}
    for name, model in {"model": settings.model, **_named("models", settings.models)}.items():
        given |= {f"{name}.path": model.path, f"{name}.tokenizer": model.tokenizer}
    for name, data in _named("data", settings.data).items():
        source = str(data.source)
        is_file = source.startswith("jsonl:")
        given[f"{name}.source"] = source.removeprefix("jsonl:") if is_file else None
    here = {key: path for key, path in given.items() if path and Path(path).expanduser().exists()}
    wanted = (
        "each machine of the slice looks for it on its own disk; put it on the bucket, gs://..."
    )
    if problems := [
        f"{config}: {key}: {path} is on this machine, and {wanted}"
        for key, path in here.items()
        if not Path(path).is_absolute()
    ]:
        raise ConfigError(problems)
    for key, path in here.items():
        typer.echo(f"{key}: {path} is on this machine; {wanted}, or mount it there, too", err=True)


def _named(section: str, entries: Mapping[str, _Entry]) -> dict[str, _Entry]:
    return {f"{section}.{name}": entry for name, entry in entries.items()}
