"""What a model can do: figures with intervals, and a run's before and after."""

from r1jax.evaluation.metrics import (
    Estimate,
    cons_at_k,
    mean_over_problems,
    pass_at_1,
    pass_at_k,
    summarise,
)
from r1jax.evaluation.results import before_and_after, write_results
from r1jax.evaluation.run_directory import Run, StageRecord, language_models, read_run
from r1jax.evaluation.seeds import mean_over_seeds, read_seeds, summary_over_seeds

__all__ = [
    "Estimate",
    "Run",
    "StageRecord",
    "before_and_after",
    "cons_at_k",
    "language_models",
    "mean_over_problems",
    "mean_over_seeds",
    "pass_at_1",
    "pass_at_k",
    "read_run",
    "read_seeds",
    "summarise",
    "summary_over_seeds",
    "write_results",
]
