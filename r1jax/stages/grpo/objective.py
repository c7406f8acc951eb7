"""The objective of a stage: of its settings, or of a module of the user's."""

from __future__ import annotations

import importlib
import inspect

from r1jax.objectives.objective import Objective, make_objective
from r1jax.settings.objective import OutsideObjective
from r1jax.settings.section import SettingError
from r1jax.stages.grpo.settings import GRPOStage

# What a stage computes where an objective needs it; every batch has the sampler's log-probs.
_COMPUTED = (
    "old_log_probs",
    "reference_log_probs",
    "sampler_log_probs",
    "segment_ids",
    "entropy",
)


def stage_objective(stage: GRPOStage) -> Objective:
    """The objective that the stage optimises.

    Raises:
      SettingError: one of the user's cannot be imported or made, or needs what a stage lacks.
    """
    settings = stage.objective_settings
    if not isinstance(settings, OutsideObjective):
        return make_objective(settings)
    objective = _from_outside(settings)
    if stage.critic is not None and objective.critic is None:
        raise SettingError("critic", f"objective {objective.name} has none; remove it")
    if stage.rewarded and stage.outputs_per_question == 1 and objective.critic is None:
        raise SettingError(
            "outputs_per_question",
            f"objective {objective.name} has no critic, and one sample no others to be compared "
            "with; give 2 or more",
        )
    if lacking := [name for name in objective.needs if name not in _COMPUTED]:
        raise SettingError(
            "objective.kind",
            f"it needs {', '.join(lacking)}, and a grpo stage has {', '.join(_COMPUTED)} alone",
        )
    if objective.advantages is None and objective.critic is None:
        raise SettingError(
            "objective.kind",
            "its advantages are None; give a function of rewards, by which groups are compared, or "
            "critic",
        )
    if stage.importance_needed and objective.correction is None:
        raise SettingError(
            "objective.kind",
            f"it has no correction, and {stage.importance_needed} trains on samples of older "
            "weights; give it one",
        )
    return objective


def _from_outside(settings: OutsideObjective) -> Objective:
    module_name, _, name = settings.kind.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise SettingError(
            "objective.kind",
            f"importing {module_name} failed: {type(error).__name__}: {error}; is its directory on "
            "PYTHONPATH?",
        ) from error
    value = getattr(module, name, None)
    if callable(value):
        try:
            inspect.signature(value).bind(**settings.options)
            value = value(**settings.options)
        except (TypeError, ValueError) as error:
            raise SettingError("objective.options", f"{name} refuses them: {error}") from error
    elif settings.options:
        raise SettingError("objective.options", f"{name} is no function, and takes none")
    if not isinstance(value, Objective):
        raise SettingError(
            "objective.kind",
            f"{name} of {module_name} is {type(value).__name__}, and no Objective of "
            "r1jax.objectives.objective, nor a function that returns one",
        )
    return value
