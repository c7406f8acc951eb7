"""What a run measured: metric files and trackers, the progress line, compilations and memory.

And what shows how it runs: profiles, and the watchdog of a run that stands still.
"""

from r1jax.metrics.compilations import CompilationCounter, memory
from r1jax.metrics.phases import ACTIVITY, phase
from r1jax.metrics.profiling import ProfiledSteps, StepProfiler
from r1jax.metrics.progress import Progress
from r1jax.metrics.recorder import Recorder
from r1jax.metrics.watchdog import EXIT_HUNG, Watchdog

__all__ = [
    "ACTIVITY",
    "EXIT_HUNG",
    "CompilationCounter",
    "ProfiledSteps",
    "Progress",
    "Recorder",
    "StepProfiler",
    "Watchdog",
    "memory",
    "phase",
]
