"""What stages compile, and what they keep in memory: for the loops, `--dry-run` and `plan` alike.

A kind of stage says it in one function, `programs(stage, planning) -> StagePrograms`, with the
functions of this folder: `train_programs` for an update, `sampling_programs` for rollouts.
"""

from r1jax.programs.program import Planning, Program, StagePrograms, TrainBatch, train_programs
from r1jax.programs.rollout import Rollout, by_slots, sampling_programs

__all__ = [
    "Planning",
    "Program",
    "Rollout",
    "StagePrograms",
    "TrainBatch",
    "by_slots",
    "sampling_programs",
    "train_programs",
]
