"""Settings of a search over the steps of a solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from r1jax.settings.sampling import DatasetSampling, SamplingSection
from r1jax.settings.section import Section
from r1jax.settings.steps import StepRule

Choice = Literal["value", "votes", "visits"]
"""How the solution of a search is chosen among those that it has completed."""


class SearchSection(Section):
    """What every search has."""

    budget_tokens: int = Field(
        ge=1,
        description="Tokens that a search may generate, all branches together; never exceeded.",
    )
    expansions: int = Field(4, ge=1, description="Next steps that are sampled of a beginning.")
    max_step_tokens: int = Field(
        128, ge=1, description="Tokens of a step at most; a longer one is cut into several."
    )
    step_rule: StepRule | None = Field(
        None,
        description="Where a step ends; default: as the process reward model has it, or behind a "
        "blank line.",
    )

    @model_validator(mode="after")
    def _room_for_a_step(self) -> SearchSection:
        least = self.expansions * self.max_step_tokens
        if self.budget_tokens < least:
            raise ValueError(
                f"budget_tokens = {self.budget_tokens} is smaller than one step: expansions x "
                f"max_step_tokens = {self.expansions} x {self.max_step_tokens} = {least}; raise "
                "it, or lower one of them"
            )
        return self


class BeamSearch(SearchSection):
    """Step-level beam search: of all next steps of all beams the best go on."""

    kind: Literal["beam"] = Field("beam", description="Step-level beam search.")
    width: int = Field(4, ge=1, description="Beginnings that go on after each step.")
    scored_by: str = Field(
        description="A reward of the stage with a process reward model, which scores beginnings."
    )
    choose: Literal["value", "votes"] = Field(
        "value",
        description="Of the completed solutions, the one with the highest score, or the best of "
        "the answer with the most votes, each weighted by its score.",
    )

    @property
    def prefixes(self) -> int:
        """Beginnings that a search continues in one round at most."""
        return self.width


class TreeSearch(SearchSection):
    """Monte Carlo tree search by PUCT, with the policy's probabilities of steps as priors."""

    kind: Literal["mcts"] = Field("mcts", description="Monte Carlo tree search.")
    simulations: int = Field(
        64, ge=1, description="Paths from the question to the end of a solution, at most."
    )
    paths_at_once: int = Field(
        1,
        ge=1,
        description="Paths that go on in one round; a virtual loss keeps them apart.",
    )
    exploration: float = Field(
        1.0, ge=0, description="Weight of the prior and of what was visited less often, c_puct."
    )
    scored_by: str | None = Field(
        None,
        description="A reward of the stage with a reward model: one of processes scores steps and "
        "solutions, another one solutions alone. Default: no model; the value of a solution is the "
        "share of completed solutions with its answer.",
    )
    valued_by: str | None = Field(
        None,
        description="In place of scored_by, a critic: an earlier train stage with objective kind "
        "ppo, or a name in models whose weights a critic's are. Its value of each beginning, cut "
        "to 0..1, is that of the search.",
    )
    choose: Choice = Field(
        "visits",
        description="Of the completed solutions, the one that the most visits lead to, the one "
        "with the highest value, or the best of the answer with the most votes, each weighted by "
        "its value.",
    )

    @model_validator(mode="after")
    def _one_source_of_values(self) -> TreeSearch:
        if self.scored_by is not None and self.valued_by is not None:
            raise ValueError(
                f"scored_by = {self.scored_by!r} and valued_by = {self.valued_by!r}: the values of "
                "a search come from one of them; remove the other"
            )
        return self

    @property
    def prefixes(self) -> int:
        """Beginnings that a search continues in one round at most."""
        return self.paths_at_once


AnySearch: TypeAlias = BeamSearch | TreeSearch


def critic_of_search(search: AnySearch) -> str | None:
    """The stage or model whose critic a search has its values from; None: it has none."""
    return search.valued_by if isinstance(search, TreeSearch) else None


Search = Annotated[
    AnySearch,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class DatasetSearch:
    """Which searches to make of a dataset or mixture: of the first `limit` prompts, or of all.

    searches: of each prompt, with other random numbers. solutions: of each search that are stored
    at most, the best first. batch: searches at once, over all processes.
    """

    data: str
    limit: int | None
    searches: int
    solutions: int
    batch: int
    max_new_tokens: int
    sampling: SamplingSection
    search: AnySearch


def search_of_each(
    sampled: DatasetSampling, search: AnySearch | None, solutions: int
) -> DatasetSearch | None:
    """A search of each prompt instead of its samples; None without `search`."""
    if search is None:
        return None
    return DatasetSearch(
        sampled.data,
        sampled.limit,
        searches=1,
        solutions=solutions,
        batch=sampled.batch,
        max_new_tokens=sampled.max_new_tokens,
        sampling=sampled.sampling,
        search=search,
    )
