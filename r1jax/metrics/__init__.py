"""What a run measures, and the watchdog of a run that makes no progress."""

from r1jax.metrics.compilations import CompilationCounter, memory
from r1jax.metrics.heartbeat import HEARTBEAT, span
from r1jax.metrics.profiling import ProfiledSteps, StepProfiler
from r1jax.metrics.progress import Progress
from r1jax.metrics.recorder import Recorder
from r1jax.metrics.watchdog import EXIT_HUNG, Watchdog

__all__ = [
    "EXIT_HUNG",
    "HEARTBEAT",
    "CompilationCounter",
    "ProfiledSteps",
    "Progress",
    "Recorder",
    "StepProfiler",
    "Watchdog",
    "memory",
    "span",
]
