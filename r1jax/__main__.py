"""The `r1jax` command, which is also `python -m r1jax`.

`r1jax.cli` makes the commands. The config of `run` is read here first: what the command line is
made of takes longer to import than a config takes to check, and a mistake should not wait for it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

_PLUGINS = "PYDANTIC_DISABLE_PLUGINS"
_FLAGS = ("--dry-run",)
_OPTIONS = ("--from", "--until", "--only", "--restart", "--profile-steps", "--slice")
"""Options of `run`, without and with a value."""


def main() -> None:
    """Runs the command that `sys.argv` names. Exits with 2 after a mistake of the user."""
    gc.disable()  # nothing that an import makes is garbage
    given = _config_of_run(sys.argv[1:])
    mistakes = None if given is None else _mistakes(*given)
    if mistakes is not None:
        print(f"\033[31m{mistakes}\033[0m" if sys.stderr.isatty() else mistakes, file=sys.stderr)
        sys.exit(2)
    from r1jax.cli import app
    from r1jax.run.gpu_memory import take_gpu_memory

    gc.enable()
    take_gpu_memory()
    app()


def _config_of_run(arguments: Sequence[str]) -> tuple[str, list[str], str | None] | None:
    """The config, the overrides and the slice of `run`; None for any other command line."""
    if arguments[:1] != ["run"] or os.environ.get("R1JAX_DEBUG") == "1":
        return None
    names: list[str] = []
    slice_name = None
    rest = iter(arguments[1:])
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option in _OPTIONS:
            value = value if equals else next(rest, "-")
            if value.startswith("-"):
                return None
            slice_name = value if option == "--slice" else slice_name
        elif not argument.startswith("-"):
            names.append(argument)
        elif argument not in _FLAGS:
            return None
    return (names[0], names[1:], slice_name) if names else None


def _mistakes(config: str, overrides: Sequence[str], slice_name: str | None) -> str | None:
    """What is wrong with a config, one line for each mistake; None: nothing, or no such mistake."""
    # Pydantic would look for plugins in the metadata of all packages: a tenth of the time.
    plugins = os.environ.get(_PLUGINS)
    os.environ[_PLUGINS] = "__all__"
    from r1jax.config.load import ConfigError, load_config

    try:
        load_config(config, overrides, slice_name)
    except ConfigError as error:
        return str(error)
    except Exception:
        return None  # `run` meets it again, and says it
    finally:
        del os.environ[_PLUGINS]
        if plugins is not None:
            os.environ[_PLUGINS] = plugins
    return None


if __name__ == "__main__":
    main()
