"""What a run measured: metric files and trackers, the progress line, compilations and memory."""

from r1jax.metrics.compilations import CompilationCounter, memory
from r1jax.metrics.json_lines import read_rows
from r1jax.metrics.progress import Progress
from r1jax.metrics.recorder import Recorder

__all__ = ["CompilationCounter", "Progress", "Recorder", "memory", "read_rows"]
