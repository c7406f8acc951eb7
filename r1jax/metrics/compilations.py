"""XLA compilations of a process, and its device memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import jax
import psutil

from r1jax.compilation_cache import cache_in_use

# Recorded by jax._src.dispatch around every request for an executable, and by jax._src.compiler
# before it looks into the persistent cache. (JAX's event of a miss is about writing.)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_LOWERED_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # what is next is compiled
_REQUEST_EVENT = "/jax/compilation_cache/compile_requests_use_cache"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"


@contextmanager
def watched_compilations(
    begins: Callable[[str], None], ends: Callable[[str, float], None]
) -> Iterator[None]:
    """Calls `begins(function)` where the compiler starts on a function of this process, and
    `ends(function, seconds)` where it is done."""

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == _LOWERED_EVENT:
            begins(_function(details))
        elif event == _COMPILE_EVENT:
            ends(_function(details), duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _function(details: Mapping[str, str | int]) -> str:
    """The function that an event is about."""
    return str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")


class CompilationCounter:
    """Counts the XLA compilations of this process while it is open.

    Every new program counts once, also one that comes from the persistent compilation cache, whose
    hits and misses are counted too (0 without one). `seconds`: spent waiting for programs.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.cache_hits = self.cache_misses = 0
        self._functions: set[str] = set()
        self._recompiled: dict[str, float] = {}
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._listen_to_cache)

    def _listen(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs
            function = _function(details)
            if function in self._functions:
                seconds = self._recompiled.get(function, 0.0) + duration_secs
                self._recompiled[function] = seconds
            self._functions.add(function)

    def _listen_to_cache(self, event: str, **_: str | int) -> None:
        if cache_in_use() is None:
            return  # JAX records requests all the same
        if event == _REQUEST_EVENT:
            self.cache_misses += 1  # until a hit is recorded
        elif event == _HIT_EVENT:
            self.cache_hits += 1
            self.cache_misses -= 1

    def figures(self) -> dict[str, int | float]:
        """The counts so far, under their names in timings.jsonl."""
        return {
            "compile_count": self.count,
            "compile_seconds": self.seconds,
            "cache_hits": self.cache_hits,
            "cache_misses": self.cache_misses,
        }

    def recompiled(self) -> dict[str, float]:
        """Functions compiled once more since the last call -> seconds, the longest first."""
        recompiled, self._recompiled = self._recompiled, {}
        return dict(sorted(recompiled.items(), key=lambda item: -item[1]))

    def close(self) -> None:
        """Stops counting; `count` and `seconds` stay readable."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
        jax.monitoring.unregister_event_listener(self._listen_to_cache)

    def __enter__(self) -> CompilationCounter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def memory() -> dict[str, int]:
    """`memory_bytes` in use and `memory_peak_bytes` so far, of this process's fullest device.

    `memory_limit_bytes` is the memory of a device, where it is known. A CPU "device" has no
    statistics: there the figures are of the resident set of the process.
    """
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    if not stats:
        info = psutil.Process().memory_info()
        used = int(info.rss)
        return {"memory_bytes": used, "memory_peak_bytes": max(used, _peak_resident_bytes())}
    figures = {
        "memory_bytes": max(int(s["bytes_in_use"]) for s in stats),
        "memory_peak_bytes": max(int(s.get("peak_bytes_in_use", s["bytes_in_use"])) for s in stats),
    }
    limits = [int(s["bytes_limit"]) for s in stats if "bytes_limit" in s]
    return figures | ({"memory_limit_bytes": min(limits)} if limits else {})


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
