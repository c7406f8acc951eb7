"""How completions are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from r1jax.settings.section import Section
from r1jax.settings.turns import Turn


class SamplingSection(Section):
    """How completions are drawn. Temperature 0 is greedy."""

    temperature: float = Field(1.0, ge=0, description="Divides the logits; 0: greedy.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw from the fewest tokens with this probability together; 1: off.",
    )
    top_k: int = Field(0, ge=0, description="Draw from the k likeliest tokens; 0: off.")
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Leave out tokens less likely than this times the likeliest; 0: off.",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Strings that end a completion."
    )
    speculative: bool = Field(
        False,
        description="Let the module for multi-token prediction draft: samples of the same "
        "distribution, sooner where it drafts well. The model needs multi_token_prediction.",
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="Samples that are decoded at once, over all devices: one that has ended makes "
        "room for the next. Default: a quarter of what is sampled, or 64 for each part of the "
        "devices, but no more than a batch of the stage.",
    )
    cache_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens that the KV cache has room for, over all devices. Where it is full, "
        "samples wait. Default: as many as the slots might need.",
    )


class LengthsSection(Section):
    """How long completions are, for `r1jax plan`: lognormal, before `max_new_tokens` cuts them."""

    mean: float = Field(ge=1, description="Tokens.")
    p99: float = Field(ge=1, description="The length that one in a hundred exceeds.")

    @model_validator(mode="after")
    def _lognormal(self) -> LengthsSection:
        if not 1 <= self.p99 / self.mean <= 14.9:
            raise ValueError("p99 is at least the mean, and at most 14.9 times as much")
        return self


PlannedLengths = Annotated[
    LengthsSection | None,
    Field(
        description="How long completions are; `r1jax plan` alone reads it. Default: all as long "
        "as they may be."
    ),
]


class EvaluationSampling(SamplingSection):
    """The paper's evaluation protocol, unless said otherwise: temperature 0.6, top-p 0.95."""

    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)


@dataclass(frozen=True)
class DatasetSampling:
    """Which samples to draw of a dataset or mixture: of the first `limit` prompts, or of all.

    samples: completions per prompt; `samples_at_once` divides it.
    batch: parts of prompts at once, over all processes.
    turns: attempts at each question with the user's texts between them; none: one attempt.
    """

    data: str
    limit: int | None
    samples: int
    samples_at_once: int
    batch: int
    max_new_tokens: int
    sampling: SamplingSection
    lengths: LengthsSection | None = None
    turns: tuple[Turn, ...] = ()
