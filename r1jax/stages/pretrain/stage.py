"""Pretraining: next-token prediction on the texts of a dataset."""

from __future__ import annotations

from r1jax.run.resolve import StageRun
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.supervised import check, packed_rows, programs, train_on_packed_rows

__all__ = ["check", "programs", "run"]


def run(stage: PretrainStage, run: StageRun) -> None:
    """Train on the dataset's texts, resuming where a former process stopped."""
    texts = run.datasets.texts(stage.data, run.models.of(stage.name))
    train_on_packed_rows(stage, run, packed_rows(stage, run, texts), stage.steps)
