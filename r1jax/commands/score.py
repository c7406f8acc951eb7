"""`r1jax score`: the rewards of completions in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1jax.commands.arguments import check_local_file

if TYPE_CHECKING:
    from r1jax.files import JsonObject


def score(
    reward: Annotated[
        str, typer.Option(help="A registered name, package.module:function or file.py:function.")
    ],
    source: Annotated[
        Path,
        typer.Option(
            "--in", help="JSON lines with prompt, completion and answer.", callback=check_local_file
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The rows with reward, outcome and extracted added.",
            callback=check_local_file,
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
