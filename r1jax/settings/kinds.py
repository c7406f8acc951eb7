"""The kinds of stages: a line here, or `kind: my_package.stages:Mine` in the config."""

from __future__ import annotations

import functools
import importlib
from typing import Literal

from pydantic import create_model

from r1jax.settings.stage import Stage, StageDescription

KINDS = {
    "pretrain": "r1jax.stages.pretrain.settings:PretrainStage",
    "sft": "r1jax.stages.sft.settings:SFTStage",
    "grpo": "r1jax.stages.grpo.settings:GRPOStage",
    "rejection_sampling": "r1jax.stages.rejection_sampling.settings:RejectionSamplingStage",
    "reward_model": "r1jax.stages.reward_model.settings:RewardModelStage",
    "evaluate": "r1jax.stages.evaluate.settings:EvaluateStage",
}


@functools.cache
def load_kind(kind: str) -> type[Stage]:
    """The settings of a kind: of `KINDS`, or imported from `package.module:Class`.

    Raises:
      ValueError: there is no such kind, or what is there is no `Stage` with a description.
    """
    module_name, colon, class_name = KINDS.get(kind, kind).partition(":")
    if not colon:
        raise ValueError(
            f"kind = {kind!r}: should be {' or '.join(KINDS)}, or package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"kind = {kind!r}: {error}; is the folder of {module_name} on PYTHONPATH?"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ValueError(f"kind = {kind!r}: not a subclass of r1jax.settings.stage.Stage")
    if not isinstance(getattr(found, "DESCRIPTION", None), StageDescription):
        raise ValueError(f"kind = {kind!r}: the class has no DESCRIPTION, a StageDescription")
    if kind in KINDS:
        return found
    tagged = create_model(
        found.__name__, __base__=found, __module__=found.__module__, kind=(Literal[kind], kind)
    )
    tagged.FUNCTIONS = found.FUNCTIONS or module_name
    return tagged


def describe_kind(kind: str) -> StageDescription:
    """What a kind says of itself; for a report of a run whose kind can no longer be imported,
    only its name."""
    try:
        return load_kind(kind).DESCRIPTION
    except ValueError:
        return StageDescription(title=kind.rpartition(":")[2], leaves="weights")
