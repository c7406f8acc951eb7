"""Compiled programs kept from run to run: JAX's persistent compilation cache, and where it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

AUTO = "auto"


def use_compilation_cache(
    setting: str | None, output: str, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Switches the cache on or off, for everything that is compiled from here on.

    Call it in every process of a run, before anything is compiled; it needs the devices. Only
    process 0 writes, and only what took JAX `jax_persistent_cache_min_compile_time_secs` (1 s) or
    more to compile.

    Args:
      setting: a directory, None for no cache, or `auto`, see `cache_directory`.
      output: of the run's config.

    Returns:
      The directory in use; None: there is no cache.
    """
    known = cache_in_use()
    directory = setting
    if setting == AUTO:
        directory = cache_directory(
            known, jax.default_backend(), jax.process_count(), output, environment
        )
    if directory != known:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()  # JAX looks only once whether there is one
    return directory


def cache_in_use() -> str | None:
    """The directory that JAX is told to keep compiled programs in, if any."""
    directory: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return directory


def cache_directory(
    known: str | None,
    backend: str,
    processes: int,
    output: str,
    environment: Mapping[str, str],
) -> str | None:
    """Where `auto` keeps compiled programs.

    - Where JAX has been told to, by JAX_COMPILATION_CACHE_DIR.
    - Nowhere on a CPU. Its programs compile in seconds, and of some processors XLA takes hints for
      its tuning (prefer-no-gather) for features that they lack: it refuses what it wrote itself,
      each time with a screen of warnings (github.com/jax-ml/jax/issues/38445).
    - With several processes in OUTPUT/compilation_cache, which all of them see: process 0 alone
      writes, so a directory of their own would stay empty for the others.
    - Else with the user's other caches: $XDG_CACHE_HOME/r1jax/compiled, ~/.cache/r1jax/compiled.
    """
    if known is not None or backend == "cpu":
        return known
    if processes > 1:
        return f"{output.rstrip('/')}/compilation_cache"
    caches = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(caches) / "r1jax" / "compiled")
