"""Settings of steps: where a step of a solution ends, and what a solution's score is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1jax.settings.section import Section

SolutionScore = Literal["minimum", "product", "last"]
"""How the scores of a solution's steps become its score."""


class StepRule(Section):
    """Where the steps of a solution end: behind a separator, and at the end of the text."""

    separators: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description='Strings behind which a step ends; default: ["\\n\\n"].'
    )
    pattern: str | None = Field(
        None, description="In place of separators, a regular expression; a step ends behind it."
    )
    join: str | None = Field(
        None,
        description="Written between steps of labelled data that have no separator themselves; "
        "default: the first of separators, or nothing.",
    )

    @property
    def expression(self) -> str:
        """A regular expression, behind whose matches a step ends."""
        if self.pattern is not None:
            return self.pattern
        # The longest first: of two that begin alike, the longer one is meant.
        return "|".join(map(re.escape, sorted(self._strings, key=len, reverse=True)))

    @property
    def joint(self) -> str:
        """What is written between steps that have no separator."""
        if self.join is not None:
            return self.join
        return "" if self.pattern is not None else self._strings[0]

    @property
    def _strings(self) -> list[str]:
        return self.separators or ["\n\n"]

    @model_validator(mode="after")
    def _one_rule(self) -> StepRule:
        if self.pattern is not None:
            if self.separators is not None:
                raise ValueError("give separators or pattern, not both")
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(
                    f"pattern {self.pattern!r} is no regular expression: {error}"
                ) from error
        return self


@dataclass(frozen=True)
class StepScoring:
    """How a process reward model scores a solution."""

    rule: StepRule
    solution_score: SolutionScore
