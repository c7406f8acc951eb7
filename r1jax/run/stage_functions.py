"""The functions of a kind of stage; `r1jax.stages` says what each of them does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from r1jax.settings.stage import Stage

if TYPE_CHECKING:
    from r1jax.programs import Planning, StagePrograms
    from r1jax.run.resolve import ResolvedRun, StageRun


class StageFunctions(Protocol):
    """What the module of a kind has."""

    def check(self, stage: Stage, run: ResolvedRun) -> None:
        """Raises ValueError for what the stage could not do; before any stage computes."""

    def programs(self, stage: Stage, planning: Planning) -> StagePrograms:
        """What the stage compiles, and what it keeps in memory."""

    def run(self, stage: Stage, run: StageRun) -> None:
        """Does the stage's work, going on where a former process stopped."""


def load_functions(stage: Stage) -> StageFunctions:
    """The functions of a stage's kind: of the module that it names, or that defines it."""
    module = type(stage).FUNCTIONS or type(stage).__module__
    return cast(StageFunctions, importlib.import_module(module))
