"""What pretraining compiles: the update on packed rows that fine-tuning has, too."""

from r1jax.stages.supervised_programs import programs

__all__ = ["programs"]
