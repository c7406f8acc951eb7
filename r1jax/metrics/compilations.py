"""What costs time and memory unseen: XLA compilations and device memory."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

import jax
import psutil

# Recorded by jax._src.dispatch around every request for an executable.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts the XLA compilations of this process while it is open.

    Every new program counts once, also one that a persistent compilation cache answers. A train
    loop whose count still grows after its first steps recompiles for changing shapes.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += duration_secs

    def close(self) -> None:
        """Stops counting; `count` and `seconds` stay readable."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

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
    """`memory_bytes` in use and `memory_peak_bytes` so far, of this process's fullest device.

    A CPU "device" keeps no statistics: there both are about the resident set of the process.
    """
    stats = [s for s in (device.memory_stats() for device in jax.local_devices()) if s]
    if stats:
        used = max(int(s["bytes_in_use"]) for s in stats)
        peak = max(int(s.get("peak_bytes_in_use", s["bytes_in_use"])) for s in stats)
    else:
        info = psutil.Process().memory_info()
        used = int(info.rss)
        peak = max(used, _peak_resident_bytes())
    return {"memory_bytes": used, "memory_peak_bytes": peak}


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
