"""Arguments and options that several commands have, and the checks of what they are given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeAlias

import typer


def check_directories(
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


def check_local_file(parameter: typer.CallbackParam, path: Path | None) -> Path | None:
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


def require_run(directory: Path, *, checkpoints: bool = False) -> None:
    """Raises ConfigError for what is no run's directory.

    Args:
      checkpoints: `RUN_DIR@STEP` is one, too.
    """
    from r1jax.config.load import ConfigError
    from r1jax.evaluation.run_directory import split_reference

    is_run = (directory / "config.yaml").is_file()
    if not is_run and not (checkpoints and split_reference(str(directory))[0]):
        raise ConfigError([f"{directory} is not a run's directory: it has no config.yaml"])


ConfigName: TypeAlias = Annotated[
    str, typer.Argument(help="A YAML file, or a name that `configs` lists.")
]
Restart: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--restart",
        metavar="STAGE",
        help="Remove what this stage has written and run it from its start; may be repeated.",
    ),
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Changes to the config, such as seed=1 or stages.rl.optimizer.learning_rate=1e-6.",
    ),
]
Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        help="A run's directory (its last weights; RUN_DIR@STEP or RUN_DIR@STAGE:STEP: a kept "
        "checkpoint), a Hugging Face directory or a hub name.",
        callback=check_directories,
    ),
]
SLICE_HELP = "A TPU slice, v5p:4x4x8 or v5p-256, with the config's settings for it."
