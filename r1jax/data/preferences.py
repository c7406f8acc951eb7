"""Preference data of reward models: pairs of responses, and responses labelled safe or unsafe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from r1jax.data.chat_template import check_template, render_prompt
from r1jax.data.example import Split
from r1jax.data.examples import (
    as_prompt,
    as_response,
    columns_of,
    load_rows,
    load_task_rows,
    missing_column,
    value_at,
)
from r1jax.data.order import id_bytes
from r1jax.data.padded_rows import pad_texts
from r1jax.data.sources import Row, Rows
from r1jax.data.tasks.task import PreferenceTask, Task
from r1jax.data.tokenizers import encode_texts
from r1jax.rewards.extraction import after_thinking
from r1jax.settings.section import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection

Reads = Literal["summary", "response"]
"""The part of a response that a reward model reads. In the R1 paper (arXiv 2501.12948 v2) the
helpful one scores only the final summary, the safety one the whole response."""

_BATCH = 2048  # Rows per tokenizer call: large enough to be fast, small enough for memory.


@dataclass(frozen=True, slots=True)
class Preference:
    """The chosen and the rejected response to a prompt, or one response with the label `safe`.

    id: the row's position in the source, before any split.
    """

    id: int
    prompt: str
    responses: tuple[str, ...]
    safe: bool | None = None


def load_preferences(section: DataSection, *, labelled: bool) -> Sequence[Preference]:
    """Rows with the fields prompt, chosen and rejected, or prompt, response and safe (true, false).

    `section.fields` maps fields to columns. With `held_out_fraction` rows are split by their
    prompt, as examples are.

    Raises ValueError: the source has no preferences, or a row lacks a field or has an empty one.
    Other errors are those of `load_examples`.
    """

    def to_row(row: _Fields, index: int) -> Preference:
        safe = row.flag("safe") if labelled else None
        return Preference(index, row.text("prompt"), tuple(map(row.text, responses)), safe)

    if str(section.source).startswith("task:"):
        return load_task_rows(section, lambda task: _rows_of(task, labelled))
    responses = ("response",) if labelled else ("chosen", "rejected")
    return _load(section, ("prompt", *responses, *(["safe"] if labelled else [])), to_row)


def _rows_of(task: Task, labelled: bool) -> Callable[[int, Split], Preference]:
    if not isinstance(task, PreferenceTask):
        raise SettingError(
            "source",
            f"the task {type(task).__name__} has no preferences; use another task, jsonl:PATH, "
            "tfds:NAME or hf:NAME",
        )

    def row(index: int, split: Split) -> Preference:
        if labelled:
            prompt, response, safe = task.labelled(index, split)
            return Preference(index, prompt, (response,), safe)
        prompt, *responses = task.pair(index, split)
        return Preference(index, prompt, tuple(responses))

    return row


@dataclass(frozen=True, slots=True)
class _Fields:
    """The fields of one row, checked when they are read; `where` names the row in errors."""

    row: Row
    columns: Mapping[str, str]
    where: str

    def text(self, field: str) -> str:
        where = f"{self.where}: column {self.columns[field]!r}"
        try:
            if field == "prompt":
                history, text = as_prompt(self._value(field), where)
                if history:
                    raise ValueError(f"{where} has several messages; needs one of the user")
            else:
                text = as_response(self._value(field), where, self.text("prompt"))
        except ValueError as error:
            if isinstance(error, SettingError):
                raise
            raise SettingError(f"fields.{field}", str(error)) from error
        if not text.strip():
            problem = f"{where} (for {field}) is empty; fill it or remove the row"
            raise SettingError(f"fields.{field}", problem)
        return text

    def flag(self, field: str) -> bool:
        value = self._value(field)
        # Truth values, of NumPy too, and 0 and 1; no text, as bool("false") is true.
        if isinstance(value, (bool, np.bool_, int, np.integer)) and value in (0, 1):
            return bool(value)
        raise SettingError(
            f"fields.{field}",
            f"{self.where}: column {self.columns[field]!r} (for {field}) = {value!r}; needs true "
            "or false",
        )

    def _value(self, field: str) -> object:
        column = self.columns[field]
        if (value := value_at(self.row, column)) is None:
            raise missing_column(self.row, column, field, self.where)
        return value


def _load(
    section: DataSection, fields: Sequence[str], to_row: Callable[[_Fields, int], Preference]
) -> Sequence[Preference]:
    for setting in ("answer_pattern", "wrong_answers", "row_format"):
        if getattr(section, setting):
            problem = "has no effect on preferences, which have no answer; remove it"
            raise SettingError(setting, problem)

    def mapping(section: DataSection, rows: Rows) -> Callable[[int], Preference]:
        columns = columns_of(section, fields)
        return lambda index: to_row(_Fields(rows.rows[index], columns, rows.label(index)), index)

    return load_rows(section, mapping, lambda row: row.prompt)


def scored_text(response: str, reads: Reads) -> str | None:
    """The part of a response (prefill included) that a reward model reads, or None if it is empty.

    `summary` is what follows the last `</think>`, without the white space around it; a thought that
    was never closed has none, and a response without a thought is all summary.
    """
    if reads == "response":
        return response
    return (after_thinking(response) or "").strip() or None


def encode_responses(
    prompts: Sequence[str],
    responses: Sequence[str],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reads: Reads,
) -> list[np.ndarray | None]:
    """Token ids of the text that a reward model scores: prompt, `scored_text`, EOS; int32 [tokens].

    The prompt (a question for each response) is rendered by the section's template, less a
    prefilled `<think>`: a whole response brings its own, and a summary follows no open thought.
    Prompt and response (without or with its EOS) are encoded apart, as sampled ids follow a
    prompt's ids. `max_prompt_tokens` has no effect. None where `scored_text` is None.

    Raises ValueError: the template does not apply, the tokenizer has no EOS token, or it cannot
    encode a text.
    """
    check_template(section)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no EOS token, at which a reward model scores a text; set eos_token"
        )
    distinct = list(dict.fromkeys(prompts))
    whole = [render_prompt(prompt, section, tokenizer) for prompt in distinct]
    rendered = [text.removesuffix(prefill) for text, prefill in whole]
    opening = dict(zip(distinct, encode_texts(rendered, tokenizer), strict=True))
    eos = str(tokenizer.eos_token)
    scored = [scored_text(response.removesuffix(eos), reads) for response in responses]
    ids = iter(encode_texts([text for text in scored if text is not None], tokenizer))
    rows = [
        None if text is None else [*opening[prompt], *next(ids), tokenizer.eos_token_id]
        for prompt, text in zip(prompts, scored, strict=True)
    ]
    return [None if row is None else np.asarray(row, np.int32) for row in rows]


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPreference:
    """A row ready for a reward model: int32 [tokens] of chosen and rejected (then `safe` is None),
    or of a labelled response.
    """

    id: int
    texts: tuple[np.ndarray, ...]
    safe: bool | None

    @property
    def longest(self) -> int:
        return max(map(len, self.texts))

    def parts(self) -> tuple[bytes, ...]:
        label = b"" if self.safe is None else b"%d" % self.safe
        return (*map(id_bytes, self.texts), label)


def encode_preferences(
    rows: Sequence[Preference],
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reads: Reads,
    max_tokens: int,
) -> tuple[list[EncodedPreference], str]:
    """Renders and encodes every row; also a sentence that counts those kept and dropped, and why.

    A pair is kept or dropped as a whole, never cut: a reward model reads how a text ends.

    `max_tokens`: The most that a text (prompt, what is read of the response, EOS) may have; 8192 in
    the R1 paper.

    Raises ValueError: no row is left (with the count of each reason), or as `encode_responses`.
    """
    kept: list[EncodedPreference] = []
    dropped = {"without a summary after the thought": 0, "too long": 0, "with equal sides": 0}
    longest = 0
    for start in range(0, len(rows), _BATCH):
        batch = [rows[i] for i in range(start, min(start + _BATCH, len(rows)))]
        prompts = [row.prompt for row in batch for _ in row.responses]
        responses = [response for row in batch for response in row.responses]
        encoded = iter(encode_responses(prompts, responses, section, tokenizer, reads=reads))
        for row in batch:
            sides = [next(encoded) for _ in row.responses]
            texts = tuple(side for side in sides if side is not None)
            longest = max(longest, *map(len, texts), 0)
            if len(texts) < len(sides):
                dropped["without a summary after the thought"] += 1
            elif max(map(len, texts)) > max_tokens:
                dropped["too long"] += 1
            elif len(texts) == 2 and np.array_equal(*texts):
                dropped["with equal sides"] += 1
            else:
                kept.append(EncodedPreference(row.id, texts, row.safe))
    reasons = ", ".join(f"{count} {what}" for what, count in dropped.items() if count)
    report = f"{len(kept)} of {len(rows)} preference rows, the longest text has {longest} tokens"
    report += f"; dropped: {reasons}" if reasons else ""
    if not kept:
        raise SettingError(
            "source",
            f"nothing is left to learn from with max_tokens = {max_tokens} and reads = {reads!r}: "
            f"{report}",
        )
    return kept, report


def preference_arrays(rows: Sequence[EncodedPreference], row_tokens: int) -> dict[str, np.ndarray]:
    """The arrays of `pad_texts`: of pairs [rows, 2, ...], chosen before rejected; of labelled
    responses [rows, ...], with `safe`, float32 [rows], 1 for safe.
    """
    arrays = pad_texts([text for row in rows for text in row.texts], row_tokens)
    labels = [row.safe for row in rows if row.safe is not None]
    if labels:
        return {**arrays, "safe": np.asarray(labels, np.float32)}
    return {name: array.reshape(len(rows), -1, *array.shape[1:]) for name, array in arrays.items()}
