"""`r1jax export`: a run's weights as a Hugging Face directory."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from r1jax.commands.arguments import check_directories, require_run


def export(
    run_directory: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR",
            help="Or RUN_DIR@STEP, RUN_DIR@STAGE:STEP.",
            callback=check_directories,
        ),
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A new directory.", callback=check_directories)
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

    require_run(locate(run_directory), checkpoints=True)
    from r1jax import recipe

    recipe.export_run(locate(run_directory), locate(destination), stage, dtype)
    typer.echo(f"exported: {destination}")
