"""What costs time and memory unseen: XLA compilations and device memory."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

import jax
import psutil

from r1jax.compilation_cache import cache_in_use

# Recorded by jax._src.dispatch around every request for an executable, and by jax._src.compiler
# where a persistent cache is asked first. (Its own event of a miss is about writing.)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_ASKED_EVENT = "/jax/compilation_cache/compile_requests_use_cache"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"


class CompilationCounter:
    """Counts the XLA compilations of this process while it is open.

    Every new program counts once, also one that a persistent compilation cache answers. A train
    loop whose count still grows after its first steps recompiles for changing shapes.

    Attributes:
      count, seconds: of all programs, and of waiting for them.
      cache_hits, cache_misses: programs that the persistent cache had, and had not; both are 0
        where there is none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        self.cache_hits = self.cache_misses = 0
        self._known: set[str] = set()
        self._again: dict[str, float] = {}
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._listen_to_cache)

    def _listen(self, event: str, duration_secs: float, **details: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs
            function = str(details.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            if function in self._known:
                self._again[function] = self._again.get(function, 0.0) + duration_secs
            self._known.add(function)

    def _listen_to_cache(self, event: str, **_: str | int) -> None:
        if cache_in_use() is None:
            return  # JAX asks all the same
        if event == _ASKED_EVENT:
            self.cache_misses += 1  # until it is found
        elif event == _HIT_EVENT:
            self.cache_hits += 1
            self.cache_misses -= 1

    def figures(self) -> dict[str, int | float]:
        """What is counted so far, under the names of timings.jsonl."""
        return {
            "compile_count": self.count,
            "compile_seconds": self.seconds,
            "cache_hits": self.cache_hits,
            "cache_misses": self.cache_misses,
        }

    def again(self) -> dict[str, float]:
        """Functions that were compiled again since the last call -> seconds, the longest first."""
        again, self._again = self._again, {}
        return dict(sorted(again.items(), key=lambda item: -item[1]))

    def close(self) -> None:
        """Stops counting; `count` and `seconds` stay readable."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
        jax.monitoring.unregister_event_listener(self._listen_to_cache)

    def __enter__(self) -> CompilationCounter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def memory() -> dict[str, int]:
    """`memory_bytes` in use, `memory_peak_bytes` so far, of this process's fullest device.

    `memory_limit_bytes` is what a device has, where it tells. A CPU "device" keeps no statistics:
    there the figures are about the resident set of the process.
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
