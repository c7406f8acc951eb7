"""The datasets of a run, read once for its checks and all of its stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from r1jax.config.run_config import RunConfig
from r1jax.config.yaml_file import ConfigError
from r1jax.data.chat_template import check_template, turn_end
from r1jax.data.conversations import encode_conversations
from r1jax.data.documents import Document, encode_documents
from r1jax.data.example import Example
from r1jax.data.examples import load_examples, row_label
from r1jax.data.mixing import mixed_id, mixture_counts
from r1jax.data.preferences import EncodedPreference, encode_preferences, load_preferences
from r1jax.data.prompts import Prompt, encode_prompts
from r1jax.data.step_labels import (
    EncodedSolution,
    NeutralLabel,
    encode_step_labels,
    load_step_labels,
)
from r1jax.run.models import LanguageModel
from r1jax.run.record import RunFiles
from r1jax.settings.data import DataSection
from r1jax.settings.section import SettingError
from r1jax.settings.stage import RewardModelFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A row of a dataset: the dataset's name and the row's index in it.
RowKey = tuple[str, int]
_CHECKED_ROWS = 256  # of a dataset to train on, before the run
_LENGTH_ROWS = 4096  # of it, before it is said that no row fits

Encode = Callable[[Sequence[RowKey]], list[Document]]


@dataclass(frozen=True)
class Datasets:
    """The datasets of a config by name; `files` has those that a stage of the run wrote."""

    config: RunConfig
    files: RunFiles
    _examples: dict[str, Sequence[Example]] = field(default_factory=dict, repr=False)
    _preferences: dict[tuple[object, ...], tuple[list[EncodedPreference], str]] = field(
        default_factory=dict, repr=False
    )
    _step_labels: dict[tuple[object, ...], tuple[list[EncodedSolution], str]] = field(
        default_factory=dict, repr=False
    )

    def section(self, data: str) -> DataSection:
        """The dataset's settings, with `stage:NAME` as the file that the stage wrote."""
        section = self.config.data[data]
        kind, _, name = str(section.source).partition(":")
        if kind != "stage":
            return section
        written = self.files.stage_directory(name) / "dataset.jsonl"
        return section.model_copy(update={"source": f"jsonl:{written}"})

    def parts(self, data: str) -> list[str]:
        """The datasets of a mixture, or the dataset itself."""
        return list(self.config.data[data].mixture) or [data]

    def examples(self, data: str) -> Sequence[Example]:
        """The examples of a dataset that is no mixture."""
        if data not in self._examples:
            with self.config.blaming("data", data):
                self._examples[data] = load_examples(self.section(data))
        return self._examples[data]

    def label(self, data: str, example: Example) -> str:
        """The file and line, or the split and row, of an example of a dataset."""
        return row_label(self.section(data), example.id)

    def is_generated(self, data: str) -> bool:
        """Whether the dataset's rows are made by a task, or by a stage of the run."""
        return str(self.config.data[data].source).startswith(("task:", "gym:", "stage:"))

    def prompts(
        self, data: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
    ) -> tuple[list[Prompt], str]:
        """The prompts of the first `limit` examples, or of all, and a line that says how many; of
        a mixture, at its shares."""
        section = self.config.data[data]
        if not section.mixture:
            examples = self.examples(data)
            if limit is not None and limit > len(examples):
                raise ValueError(f"data.{data} has {len(examples)} examples, fewer than {limit}")
            with self.config.blaming("data", data):
                return encode_prompts(examples[:limit], section, tokenizer)
        parts = {part: self.prompts(part, tokenizer) for part in section.mixture}
        rows = {part: len(prompts) for part, (prompts, _) in parts.items()}
        counts = mixture_counts(rows, section.mixture, limit)
        mixed = [
            replace(prompt, id=mixed_id(prompt.id, index, len(parts)))
            for index, (part, (prompts, _)) in enumerate(parts.items())
            for prompt in prompts[: counts[part]]
        ]
        return mixed, "; ".join(f"{part}: {counts[part]} of {parts[part][1]}" for part in parts)

    def conversations(self, data: str, model: LanguageModel) -> tuple[list[RowKey], Encode]:
        """The rows of a dataset or mixture of conversations, and what reads and encodes some."""

        def encode(part: str, examples: Sequence[Example]) -> list[Document]:
            section = self.config.data[part]
            return encode_conversations(
                examples, section=section, tokenizer=model.tokenizer, stop_ids=model.eos_ids
            )

        return self._documents(data, encode)

    def texts(self, data: str, model: LanguageModel) -> tuple[list[RowKey], Encode]:
        """The rows of a dataset or mixture of texts, and what reads and encodes some."""
        return self._documents(data, lambda _, rows: encode_documents(rows, model.tokenizer))

    def check_documents(
        self,
        data: str,
        model: LanguageModel,
        reader: str,
        *,
        conversations: bool,
        row_tokens: int,
    ) -> None:
        """Raises ConfigError where the template, or a first row, cannot be what is trained on, and
        where no row fits into `row_tokens`.

        Of each part of `data` the first `_CHECKED_ROWS` rows are encoded, and up to `_LENGTH_ROWS`
        as long as none fits; of those that a stage of the run writes, none. reader: the stage.
        """
        lengths: list[int] = []
        for part in self.parts(data):
            section = self.config.data[part]
            with self.config.blaming("data", part, reader=reader):
                if conversations:
                    check_template(section)
                    turn_end(section, model.tokenizer, model.eos_ids)
            if self.config.source_stages(part):
                lengths.append(0)  # not known yet
                continue
            read = self.conversations if conversations else self.texts
            rows, encode = read(part, model)
            for start in range(0, min(len(rows), _LENGTH_ROWS), _CHECKED_ROWS):
                documents = encode(rows[start : start + _CHECKED_ROWS])
                lengths += [len(document.tokens) for document in documents]
                if min(lengths) <= row_tokens:
                    break
        if lengths and min(lengths) > row_tokens:
            raise self.config.refusal(
                ("stages", reader, "row_tokens"),
                f"none of the {len(lengths)} rows of data.{data} that were looked at fits: longer "
                f"ones are left out, and the shortest has {min(lengths)} tokens. Set row_tokens to "
                f"at least {min(lengths)}, or give shorter rows",
            )

    def check_limit(self, data: str, limit: int) -> None:
        """Raises SettingError for fewer rows than `limit`."""
        if not self.config.data[data].mixture:
            if (count := len(self.examples(data))) < limit:
                raise SettingError("source", f"it has {count} rows, fewer than {limit}")
            return
        try:
            self._counts(data, limit)
        except ConfigError:
            raise
        except ValueError as error:
            raise SettingError("mixture", str(error).removeprefix("mixture: ")) from error

    def domains(self, data: str, limit: int | None = None) -> list[str]:
        """The domains of the first `limit` examples of a dataset or mixture, or of all."""
        counts = self._counts(data, limit)
        examples = (self.examples(part)[:count] for part, count in counts.items())
        return list(dict.fromkeys(example.domain for part in examples for example in part))

    def _counts(self, data: str, limit: int | None = None) -> dict[str, int]:
        counts = {part: len(self.examples(part)) for part in self.parts(data)}
        if mixture := self.config.data[data].mixture:
            return mixture_counts(counts, mixture, limit)
        return counts if limit is None else {data: limit}

    def _documents(
        self, data: str, encode_part: Callable[[str, Sequence[Example]], list[Document]]
    ) -> tuple[list[RowKey], Encode]:
        counts = self._counts(data)
        parts = {part: self.examples(part) for part in counts}

        def encode(rows: Sequence[RowKey]) -> list[Document]:
            documents: dict[RowKey, Document] = {}
            for part, examples in parts.items():
                of_part = [row for row in rows if row[0] == part]
                with self.config.blaming("data", part):
                    encoded = encode_part(part, [examples[index] for _, index in of_part])
                documents |= dict(zip(of_part, encoded, strict=True))
            return [documents[row] for row in rows]

        return [(part, index) for part in parts for index in range(counts[part])], encode

    def preferences(
        self, data: str, form: RewardModelFormat, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[EncodedPreference], str]:
        """The encoded preference rows of a dataset, and a line that says how many there are."""
        key = (data, form, tokenizer)
        if key not in self._preferences:
            section = self.config.data[data]
            with self.config.blaming("data", data):
                rows = load_preferences(section, labelled=form.labelled)
                self._preferences[key] = encode_preferences(
                    rows, section, tokenizer, reads=form.reads, max_tokens=form.max_tokens
                )
        return self._preferences[key]

    def step_labels(
        self,
        data: str,
        form: RewardModelFormat,
        tokenizer: PreTrainedTokenizerBase,
        *,
        neutral: NeutralLabel,
    ) -> tuple[list[EncodedSolution], str]:
        """The encoded solutions of a dataset of labelled steps, and a line that says how many there
        are. `neutral`: see `load_step_labels`."""
        assert form.steps is not None
        rule = form.steps.rule
        key = (data, rule.model_dump_json(), form.max_tokens, neutral, tokenizer)
        if key not in self._step_labels:
            section = self.section(data)
            with self.config.blaming("data", data):
                rows = load_step_labels(section, neutral=neutral)
                self._step_labels[key] = encode_step_labels(
                    rows, section, rule, tokenizer, max_tokens=form.max_tokens
                )
        return self._step_labels[key]
