"""The models that a run has left so far: finished stages, and checkpoints of those that are not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from r1jax.checkpoints import DamagedError, kept_steps, restore_part
from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.evaluation.run_directory import language_models, split_reference
from r1jax.models.parameters import abstract_weights
from r1jax.processes import join_processes, wait_for_all
from r1jax.run.models import LanguageModel
from r1jax.run.record import RunFiles
from r1jax.sharding import make_layout

_EXPORTED = "exported"


@dataclass(frozen=True)
class FoundModel:
    """A Hugging Face directory or a hub name; of a checkpoint, the stage and the step."""

    path: str
    stage: str = ""
    step: int | None = None


def find_model(name: str, stage: str | None = None) -> FoundModel:
    """The model that a command's argument names.

    Args:
      name: RUN_DIR: what the last finished train stage left, and of a run without one the newest
        intact checkpoint, with a line on stderr about damaged newer ones; RUN_DIR@STEP: a kept
        checkpoint, of the last stage that has it; RUN_DIR@STAGE:STEP: of that stage. A Hugging Face
        directory or a hub name is itself.
      stage: another way to name the stage.

    A checkpoint is exported, once, below its stage's folder `exported`.

    Raises:
      ValueError: no such checkpoint, or it is damaged; the message lists those that are kept.
    """
    directory, wanted = split_reference(name)
    if directory is None:
        return FoundModel(name)
    config = load_config(directory / "config.yaml")
    files = RunFiles(directory, tuple(each.name for each in config.stages))
    if wanted is None:
        finished = language_models(directory)
        if stage is not None:
            finished = [path for path in [_trained(files, stage)] if path.is_dir()]
        if finished:
            return FoundModel(str(finished[-1]))
    named, _, number = (wanted or "").rpartition(":")
    kept = _kept(config, files, named or stage or "")
    matching = [(each, step) for each, step in kept if number in ("", str(step))]
    if not matching:
        if wanted is None and stage is None and not kept and config.model.path is not None:
            return FoundModel(config.model.path)  # a run that only evaluates
        raise ValueError(
            f"{name}: no finished train stage and no such checkpoint; {_shown(files, kept)}"
        )
    if number:  # one of the last stage that has it, and no other step
        matching = matching[-1:]
    problems: list[str] = []
    damaged: list[tuple[str, int]] = []
    for found, step in reversed(matching):
        try:
            path = _export(config, files, found, step)
        except DamagedError as error:
            problems.append(str(error))
            damaged.append((found, step))
            continue
        if problems and jax.process_index() == 0:
            print(f"{'; '.join(problems)}. {found}:{step} is used", file=sys.stderr, flush=True)
        return FoundModel(str(path), found, step)
    intact = [each for each in kept if each not in damaged]
    raise ValueError(f"{name}: {'; '.join(problems)}; {_shown(files, intact)}")


def _shown(files: RunFiles, kept: Sequence[tuple[str, int]]) -> str:
    """The checkpoints that may be named, and how; without those whose directory is empty."""
    names = [f"{each}:{step}" for each, step in kept if _has_files(files, each, step)]
    return f"kept are {', '.join(names) or 'none'}, as in {files.directory}@STAGE:STEP"


def _has_files(files: RunFiles, stage: str, step: int) -> bool:
    return any((_checkpoints(files, stage) / str(step)).glob("*"))


def _kept(config: RunConfig, files: RunFiles, stage: str) -> list[tuple[str, int]]:
    """(stage, step) of all kept checkpoints, in the order of the stages; or those of one."""
    if stage:
        _trained(files, stage)
    kept: list[tuple[str, int]] = []
    for each in config.stages:
        # Reward models write no text: only by name.
        if each.DESCRIPTION.trains and stage in ("", each.name):
            if stage or each.DESCRIPTION.leaves == "weights":
                steps = kept_steps(_checkpoints(files, each.name))
                kept += [(each.name, step) for step in steps]
    return kept


def _trained(files: RunFiles, stage: str) -> Path:
    if stage not in files.stages:
        raise ValueError(f"no stage {stage}; there are {', '.join(files.stages)}")
    return files.trained(stage)


def _checkpoints(files: RunFiles, stage: str) -> Path:
    return files.stage_directory(stage) / "checkpoints"


def _export(config: RunConfig, files: RunFiles, stage: str, step: int) -> Path:
    target = files.stage_directory(stage) / _EXPORTED / str(step)
    if (target / "config.json").is_file():
        return target
    join_processes()
    # The run's own mesh may be that of a slice; the weights are the same on any.
    layout = make_layout({"data": 1, "fsdp": -1, "tensor": 1})
    model = LanguageModel.resolve(config.section_of(config.model_of(stage)), layout)
    if (head := config.stage(stage).DESCRIPTION.head) is not None:
        model = model.with_head(head)
    wanted = {"state": {"params": abstract_weights(model.decoder)}}
    arrays = restore_part(_checkpoints(files, stage), step, wanted)
    target.parent.mkdir(parents=True, exist_ok=True)
    model.export(target, arrays["state"]["params"])
    wait_for_all("exported")
    return target
