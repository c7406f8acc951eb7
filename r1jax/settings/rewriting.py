"""How kept completions are rewritten into texts to train on: by rule, by a server, by a model."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from r1jax.settings.sampling import SamplingSection
from r1jax.settings.section import Section

_Style = Annotated[
    Literal["think", "tags", "boxed"], Field(description="Shape of the result (`rewards.format`).")
]
_Instruction = Annotated[
    str | None, Field(description="What to do; default: `r1jax.data.rewriting.INSTRUCTION`.")
]


class RuleRewrite(Section):
    r"""Thought and answer put into a template.

    Placeholders are `{thought}`, `{summary}`, `{question}`, `{answer}`. Other braces stay as they
    are, so a boxed answer is `\boxed{{answer}}`.
    """

    kind: Literal["rule"] = Field("rule", description="By a template, without a model.")
    template: str = Field(
        "<think>{thought}</think>\n\n{summary}", description="The text, with placeholders."
    )
    summary: str = Field(
        r"The final answer is \boxed{{answer}}.",
        description="The text of {summary}, with the other placeholders.",
    )
    program_summary: str = Field(
        "```\n{program}```",
        description="That text where the answer is a program: {question} and {program}, which ends "
        "with a newline.",
    )
    replacements: dict[str, str] = Field(
        default_factory=dict, description="Words of the thought -> what to say instead."
    )
    style: _Style = "think"


class EndpointRewrite(Section):
    """By a model behind an OpenAI-compatible server, one request for each draft.

    Its answer must contain the thought: turn a "reasoning parser" off, which removes `<think>`.
    """

    kind: Literal["endpoint"] = Field("endpoint", description="By a model on a server.")
    url: str = Field(description="Up to the version, such as http://localhost:8000/v1.")
    model: str = Field(min_length=1, description="Its name on the server.")
    instruction: _Instruction = None
    max_new_tokens: int = Field(8192, ge=1, description="Tokens of a rewritten text at most.")
    temperature: float = Field(0.6, ge=0, le=2, description="Of the server's sampling.")
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable with the key; unset or empty for a server without keys.",
    )
    retries: int = Field(
        6,
        ge=0,
        description="Repetitions of a request after a failure that may be temporary: status 408, "
        "429 or 5xx, no connection, a time-out, an answer that is not JSON of the right shape.",
    )
    timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="Without a byte from the server; a whole answer may take three times as long.",
    )
    concurrency: int = Field(8, ge=1, description="Requests at a time.")
    style: _Style = "think"

    @model_validator(mode="after")
    def _check_url(self) -> EndpointRewrite:
        parts = urlsplit(self.url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or re.search(r"\s", self.url)
        ):
            raise ValueError(f"url = {self.url!r}: needs http://HOST/v1 or https://HOST/v1")
        if parts.username is not None:
            raise ValueError(
                f"url: names a user for {parts.hostname}; put a key into the environment variable "
                f"{self.api_key_env} instead"
            )
        if parts.query or parts.fragment or self.url.rstrip("/").endswith("/chat/completions"):
            raise ValueError(
                f"url = {self.url!r}: give it up to the version, such as http://HOST/v1; "
                "/chat/completions is added"
            )
        return self


class ModelRewrite(Section):
    """By a model of this run: an earlier train stage, or a name in `models`."""

    kind: Literal["model"] = Field("model", description="By a model of this run.")
    weights: str = Field(description="An earlier train stage, or a name in models.")
    instruction: _Instruction = None
    template: Literal["chat", "r1_zero", "plain"] = Field(
        "chat", description="In which the instruction and the draft are put; as of datasets."
    )
    max_new_tokens: int = Field(8192, ge=1, description="Tokens of a rewritten text at most.")
    drafts_per_batch: int = Field(
        32, ge=1, description="Drafts that are rewritten at once, over all processes."
    )
    sampling: SamplingSection = SamplingSection(temperature=0.6)
    style: _Style = "think"


Rewrite = Annotated[RuleRewrite | EndpointRewrite | ModelRewrite, Field(discriminator="kind")]
