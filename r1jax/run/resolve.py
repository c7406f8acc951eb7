"""A run, resolved from its config before any compute; and what the loop of one stage gets."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import jax
from huggingface_hub.utils.tqdm import disable_progress_bars

from r1jax.config.run_config import RunConfig
from r1jax.metrics import ProfiledSteps
from r1jax.run.datasets import Datasets
from r1jax.run.files import RunFiles
from r1jax.run.models import Layouts, Models, make_layouts
from r1jax.run.record import Record
from r1jax.run.stop import StopSignal
from r1jax.settings.stage import Stage
from r1jax.sharding import split_cpu

if TYPE_CHECKING:
    from r1jax.programs import Planning, StagePrograms


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
    """What the loop of one stage gets: its directory, which exists, and steps to trace, too."""

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


class _StageFunctions(Protocol):
    """The functions of a kind of stage; `r1jax.stages` says what each of them does."""

    def check(self, stage: Stage, run: ResolvedRun) -> None:
        """Raises ValueError for what the stage could not do; before any stage computes."""

    def programs(self, stage: Stage, planning: Planning) -> StagePrograms:
        """What the stage compiles, and what it keeps in memory."""

    def run(self, stage: Stage, run: StageRun) -> None:
        """Does the stage's work, going on where a former process stopped."""


def load_functions(stage: Stage) -> _StageFunctions:
    """The functions of a stage's kind: of the module that it names, or that defines it."""
    module = type(stage).FUNCTIONS or type(stage).__module__
    return cast(_StageFunctions, importlib.import_module(module))
