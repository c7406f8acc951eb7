"""The command line: `r1jax run tiny/r1_zero seed=1`. What the commands do is in `r1jax/commands/`.

Mistakes of the user (a `ConfigError`, a missing file, a value refused with a reason) are one red
message and exit status 2; a run that gives up with advice is one with status 1. R1JAX_DEBUG=1 shows
the traceback instead. After 143 (SIGTERM: saved) and 134 (another process of the run is lost) the
same command goes on from the last checkpoint; tpu_scripts/ give it again. After 130 (Ctrl-C: saved,
or left at once by a second one) it does, too.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from r1jax.commands.configs import configs, explain
from r1jax.commands.console import process_index
from r1jax.commands.evaluate import evaluate
from r1jax.commands.export import export
from r1jax.commands.on_slice import on_slice
from r1jax.commands.plan import plan, plan_all
from r1jax.commands.report import report
from r1jax.commands.run import run
from r1jax.commands.sample import sample, search
from r1jax.commands.score import score


class _Commands(TyperGroup):
    """Prints the user's mistakes as messages."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, typer.Exit, typer.Abort):
            raise  # `r1jax configs | head`: nobody is left to read a message.
        except Exception as error:
            # The package's own errors are worded for users; another library's RuntimeError, such
            # as XLA's, needs its traceback.
            ours = type(error).__module__.startswith("r1jax.")
            failed = isinstance(error, RuntimeError)
            # Python's import errors have a name; those that ask for an extra are only text.
            broken = isinstance(error, ImportError) and error.name is not None
            worded = isinstance(error, ValueError | OSError | ImportError) or (failed and ours)
            process = process_index()
            prefix = "" if process is None else f"[process {process}] "
            if os.environ.get("R1JAX_DEBUG") == "1" or broken or not worded:
                if prefix:  # whose traceback it is
                    typer.secho(f"{prefix}failed:", fg=typer.colors.RED, err=True)
                raise
            _print_error(error, prefix, with_place=not ours)
            raise typer.Exit(1 if failed else 2) from None


def _print_error(error: Exception, prefix: str, with_place: bool) -> None:
    """The message, and for errors that may be a fault of r1jax, where it was raised.

    Those that r1jax raises itself are worded for users; others come from a library, or from Python.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    typer.secho(prefix + text, fg=typer.colors.RED, err=True)
    package = f"{Path(__file__).parent}{os.sep}"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(package)]
    if inside and with_place and not _raised_here(frames[-1], package):
        place = f"{inside[-1].filename}:{inside[-1].lineno}"
        typer.secho(f"({place}; R1JAX_DEBUG=1 shows the traceback)", dim=True, err=True)


def _raised_here(frame: traceback.FrameSummary, package: str) -> bool:
    """Whether a `raise` of the package is the origin of an error; its last frame is given."""
    statement = frame.line or "raise"  # without the source: most likely
    return frame.filename.startswith(package) and statement.startswith("raise")


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The DeepSeek-R1 recipe in JAX: train, evaluate and sample models that reason.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("r1jax"))
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


# In the order of `--help`.
app.command()(run)
app.command()(plan)
app.command(hidden=True, context_settings={"ignore_unknown_options": True})(on_slice)
app.command()(plan_all)
app.command(name="eval")(evaluate)
app.command()(sample)
app.command()(search)
app.command()(score)
app.command()(export)
app.command()(report)
app.command()(configs)
app.command()(explain)
