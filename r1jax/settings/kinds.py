"""The kinds of stages: a line here, or `kind: my_package.stages:Mine` in the config."""

from __future__ import annotations

import functools
import importlib

from r1jax.settings.names import nearest
from r1jax.settings.stage import Stage, StageDescription

KINDS = {
    "pretrain": "r1jax.stages.pretrain.settings:PretrainStage",
    "sft": "r1jax.stages.sft.settings:SFTStage",
    "grpo": "r1jax.stages.grpo.settings:GRPOStage",
    "rejection_sampling": "r1jax.stages.rejection_sampling.settings:RejectionSamplingStage",
    "reward_model": "r1jax.stages.reward_model.settings:RewardModelStage",
    "step_labels": "r1jax.stages.step_labels.settings:StepLabelsStage",
    "process_reward_model": "r1jax.stages.process_reward_model.settings:ProcessRewardModelStage",
    "evaluate": "r1jax.stages.evaluate.settings:EvaluateStage",
}


@functools.cache
def load_kind(kind: str) -> type[Stage]:
    """The settings of a kind: of `KINDS`, or imported from `package.module:Class`.

    Raises ValueError: there is no such kind, or it is no `Stage` with a description. The message is
    meant to stand behind the value.
    """
    module_name, colon, class_name = KINDS.get(kind, kind).partition(":")
    if not colon:
        raise ValueError(
            f"{nearest(kind, KINDS)}should be {', '.join(KINDS)}, or package.module:Class"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"importing {module_name} failed: {type(error).__name__}: {error}; "
            "is its directory on PYTHONPATH?"
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ValueError(
            f"{module_name} has no class {class_name!r} derived from r1jax.settings.stage.Stage"
        )
    if not isinstance(getattr(found, "DESCRIPTION", None), StageDescription):
        raise ValueError(f"{class_name} has no DESCRIPTION, a StageDescription")
    return found


def describe_kind(kind: str) -> StageDescription:
    """What a kind says of itself; for a report of a run whose kind can no longer be imported,
    only its name."""
    try:
        return load_kind(kind).DESCRIPTION
    except ValueError:
        return StageDescription(title=kind.rpartition(":")[2], leaves="weights")
