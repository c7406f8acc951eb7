"""A run, resolved from its config before any compute; and what the loop of one stage gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax
from huggingface_hub.utils.tqdm import disable_progress_bars

from r1jax.config.run_config import RunConfig
from r1jax.metrics import ProfiledSteps
from r1jax.run.datasets import Datasets
from r1jax.run.files import RunFiles
from r1jax.run.models import Layouts, Models, make_layouts
from r1jax.run.record import Record
from r1jax.run.stop import StopSignal
from r1jax.sharding import split_cpu


@dataclass(frozen=True)
class ResolvedRun:
    """A config with its devices, models, datasets and files: what checks and `--dry-run` need."""

    config: RunConfig
    layouts: Layouts
    models: Models
    datasets: Datasets
    files: RunFiles


@dataclass(frozen=True)
class StageRun(ResolvedRun):
    """What the loop of one stage gets.

    directory: of the stage; it exists.
    profile: optimizer steps to trace in this process.
    """

    directory: Path
    record: Record
    stop: StopSignal
    profile: ProfiledSteps | None = None


def resolve(config: RunConfig) -> ResolvedRun:
    """Raises ValueError where mesh, devices, models, tokenizers and vocabularies do not fit."""
    split_cpu(config.mesh.cpu_devices)
    layouts = make_layouts(config.mesh)
    if jax.process_index() > 0:  # the bars of downloads are process 0's, as ours are
        disable_progress_bars()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    files = RunFiles.of(config)
    models = Models.resolve(config, layouts, files)
    return ResolvedRun(config, layouts, models, Datasets(config, files), files)
