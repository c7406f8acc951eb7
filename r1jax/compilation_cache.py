"""JAX's persistent compilation cache: whether it is used, and in which directory."""

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
    """Switches the cache on or off for all later compilations; returns its directory, if any.

    Call it in every process of a run, before anything is compiled; it needs the devices. Only
    process 0 writes, and only programs that took `jax_persistent_cache_min_compile_time_secs` (1 s)
    or more. `setting`: a directory, None for no cache, or `auto`, see `_cache_directory`.
    """
    known = cache_in_use()
    directory = setting
    if setting == AUTO:
        backend, processes = jax.default_backend(), jax.process_count()
        directory = _cache_directory(known, backend, processes, output, environment)
    if directory != known:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()  # JAX reads the setting only once
    return directory


def cache_in_use() -> str | None:
    """The directory of JAX's persistent compilation cache, if it has one."""
    directory: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    return directory


def _cache_directory(
    known: str | None, backend: str, processes: int, output: str, environment: Mapping[str, str]
) -> str | None:
    """The directory that the setting `auto` means.

    - The one JAX uses already, by JAX_COMPILATION_CACHE_DIR.
    - None on a CPU. Its programs compile in seconds, and on some processors XLA takes hints for its
      tuning (prefer-no-gather) for features that they lack: it refuses what it wrote itself, each
      time with a screen of warnings (github.com/jax-ml/jax/issues/38445).
    - With several processes OUTPUT/compilation_cache, which all of them can read: only process 0
      writes, so local directories would stay empty on the others.
    - Else $XDG_CACHE_HOME/r1jax/compiled or ~/.cache/r1jax/compiled.
    """
    if known is not None or backend == "cpu":
        return known
    if processes > 1:
        return f"{output.rstrip('/')}/compilation_cache"
    caches = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(caches) / "r1jax" / "compiled")
