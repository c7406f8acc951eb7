"""What stages compile, and what they keep in memory: for the loops, `--dry-run` and `plan` alike.

A kind of stage says it in one function, `programs(stage, planning) -> StagePrograms`, with the
functions of this folder: `train_programs` for an update, `sampling_programs` for rollouts.
"""

from r1jax.programs.program import Planning, Program, StagePrograms, TrainBatch, train_programs
from r1jax.programs.rollout import sampling_programs
from r1jax.programs.slots import SlotRollout

__all__ = [
    "Planning",
    "Program",
    "SlotRollout",
    "StagePrograms",
    "TrainBatch",
    "sampling_programs",
    "train_programs",
]
