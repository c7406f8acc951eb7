"""Settings of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1jax.files import JsonObject
from r1jax.settings.benchmarks import fill_in, find_benchmark
from r1jax.settings.section import Section

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "prompt": "The question, without a template: a text, or a list of messages that ends with "
        "the user's.",
        "answer": "The reference answer that rewards compare with: a text or a number; lists and "
        "mappings become JSON.",
        "text": "A whole text, for pretrain.",
        "domain": "A label, which rewards may be limited to.",
        "response": "The assistant's answer to the prompt: of sft, and of reward_model with "
        "loss: pointwise.",
        "messages": "A whole conversation, for sft in place of prompt and response: a list of "
        "{role, content} or {from, value}.",
        "chosen": "The better response to the prompt, for reward_model with loss: pairwise.",
        "rejected": "The worse response to the prompt, for reward_model with loss: pairwise.",
        "safe": "Whether the response is safe, true or false, for reward_model with "
        "loss: pointwise.",
        "completions": "The steps of a solution, a list of texts, for process_reward_model.",
        "labels": "For each of the completions whether it is right, a list of true, false, a "
        "number in 0..1 or null, for process_reward_model.",
    }
)
"""Field of a row -> what it holds; a row of docs/data.md for each kind of stage."""


class DataSection(Section):
    """One named dataset, mapped to `r1jax.data.example.Example`: a source, or a mixture."""

    source: str | None = Field(
        None,
        description="tfds:NAME, jsonl:PATH, hf:NAME, task:NAME, gym:NAME (of reasoning-gym), "
        "or stage:NAME for the dataset that a rejection_sampling stage of this run wrote.",
    )
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="dataset -> share, in place of a source. No row is used twice: the part that "
        "runs out first limits the others.",
    )
    benchmark: str | None = Field(
        None,
        description="A name in r1jax.settings.benchmarks, which gives what is not set here; with a "
        "source of your own it gives neither split nor options.",
    )
    domain: str = Field(
        "", description="Label of the rows, which rewards may be limited to; default: the row's."
    )
    split: str = Field("train", description="`train` or `held_out`; or the source's own split.")
    fields: dict[str, str | None] = Field(
        default_factory=dict,
        description="Field of a row (prompt, answer, text, domain, response, messages; for reward "
        "models also chosen, rejected, safe, completions, labels) -> the source's column with it. "
        "Default: the column of the same name. a.b is the key b of the column a; null: the field "
        "is not read, even if there is such a column.",
    )
    answer_pattern: str | None = Field(
        None, description="Regular expression; group 1 of its last match is the answer."
    )
    wrong_answers: list[str] = Field(
        default_factory=list,
        description="Columns of wrong options: the prompt gets lettered options in an order that "
        "depends on their texts alone, and the answer is the right one's letter.",
    )
    row_format: Literal["livecodebench"] | None = Field(
        None,
        description="livecodebench: prompt and answer (hidden tests) are made of that dataset's "
        "columns; see r1jax.data.livecodebench.",
    )
    template: str = Field(
        "chat", description="chat (the tokenizer's), r1_zero (the paper's), or plain."
    )
    system_prompt: str | None = Field(None, description="System message before each prompt.")
    prompt_prefix: str = Field(
        "", description="Text before each prompt, as it is, such as worked examples."
    )
    prompt_suffix: str = Field("", description="Text behind each prompt, as it is.")
    chat_template_kwargs: JsonObject | None = Field(
        None,
        description="Variables of the tokenizer's chat template, such as {enable_thinking: false}.",
    )
    max_prompt_tokens: int = Field(
        1024, ge=1, description="Longer prompts are left out and counted."
    )
    held_out_fraction: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="jsonl/hf/tfds/gym: share of rows, by a hash of the prompt.",
    )
    limit: int | None = Field(
        None, ge=1, le=10**12, description="Use only the first N rows of the split."
    )
    options: JsonObject = Field(
        default_factory=dict,
        description="Further arguments of the source. tfds: data_dir. hf: config, revision, "
        "data_files. task and gym: the task's own. With held_out_fraction also from_split, the "
        "source's split that is divided.",
    )

    @classmethod
    def fill_in(cls, section: JsonObject) -> dict[str, str]:
        """Put what `benchmark` implies into a section as read from YAML; key -> problem."""
        if section.get("benchmark") is None:
            return {}
        try:
            defaults = find_benchmark(section["benchmark"]).data
        except ValueError as error:
            return {"benchmark": str(error)}
        if "source" in section:
            defaults = {k: v for k, v in defaults.items() if k not in ("split", "options")}
        fill_in(section, defaults)
        return {}

    @model_validator(mode="after")
    def _source_or_mixture(self) -> DataSection:
        if (self.source is None) == (not self.mixture):
            raise ValueError("give exactly one of source and mixture")
        plain = DataSection.model_construct(mixture=self.mixture)
        fields = type(self).model_fields
        given = [name for name in fields if getattr(self, name) != getattr(plain, name)]
        if self.mixture and given:
            raise ValueError(
                f"{given[0]} has no effect on a mixture; set it in the datasets that it names"
            )
        return self
