"""Solutions whose steps are labelled: what process reward models learn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from r1jax.data.chat_template import check_template, render_prompt
from r1jax.data.examples import as_prompt, as_text, columns_of, load_rows, missing_column, value_at
from r1jax.data.order import id_bytes
from r1jax.data.padded_rows import pad_texts
from r1jax.data.sources import Row, Rows
from r1jax.data.steps import TokenSteps, join_steps
from r1jax.data.tokenizers import encode_texts
from r1jax.settings.section import SettingError
from r1jax.settings.steps import StepRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from r1jax.settings.data import DataSection

_FIELDS = ("prompt", "completions", "labels")
_BATCH = 2048  # Rows per tokenizer call: large enough to be fast, small enough for memory.

NeutralLabel = float | None
"""The label of a step that is rated neutral; None: it is not learnt from."""


@dataclass(frozen=True, slots=True)
class LabelledSolution:
    """The steps of a solution, each with the probability that it is right, or None: not labelled.

    id: the row's position in the source, before any split; PRM800K's rows hold several solutions.
    """

    id: int
    prompt: str
    steps: tuple[str, ...]
    labels: tuple[float | None, ...]


def load_step_labels(section: DataSection, *, neutral: NeutralLabel) -> list[LabelledSolution]:
    """Rows of prompt, completions (the steps) and labels, as TRL has them, or those of PRM800K.

    A label is true or false, or a number in 0..1, or null for a step without one. A row of PRM800K
    has `question.problem` and `label.steps`, with completions that are rated -1, 0 or 1: it gives
    the solution that the labeller chose, and for every other completion of a step one that ends
    with it, of which that step alone is labelled. `neutral` is the label of the rating 0.

    `section.fields` maps fields to columns. With `held_out_fraction` rows are split by their
    prompt, as examples are.

    Raises ValueError: a row lacks a field, has a step without text, not one label for each
    step, or a label that is none; the message names the row. Other errors are those of
    `load_examples`.
    """
    for setting in ("answer_pattern", "wrong_answers", "row_format"):
        if getattr(section, setting):
            problem = "has no effect on labelled steps, which have no answer; remove it"
            raise SettingError(setting, problem)

    def mapping(section: DataSection, rows: Rows) -> Callable[[int], tuple[LabelledSolution, ...]]:
        columns = {field: field for field in _FIELDS} | columns_of(section, _FIELDS)
        return lambda index: _solutions(
            rows.rows[index], columns, index, rows.label(index), neutral
        )

    solutions = load_rows(section, mapping, lambda row: row[0].prompt)
    return [each for of_row in solutions for each in of_row]


def _solutions(
    row: Row, columns: Mapping[str, str], index: int, where: str, neutral: NeutralLabel
) -> tuple[LabelledSolution, ...]:
    label = value_at(row, "label")
    nested = isinstance(label, Mapping) and "steps" in label
    if nested and value_at(row, columns["completions"]) is None:
        return tuple(_of_prm800k(row, index, where, neutral))
    values = {}
    for field in _FIELDS:
        if (value := value_at(row, columns[field])) is None:
            raise missing_column(row, columns[field], field, where)
        values[field] = value
    prompt = _prompt(values["prompt"], f"{where}: column {columns['prompt']!r}", "prompt")
    steps = tuple(
        _step(text, f"{where}: column {columns['completions']!r}, step {number}")
        for number, text in enumerate(
            _list(values["completions"], where, columns, "completions"), start=1
        )
    )
    labels = _list(values["labels"], where, columns, "labels")
    if len(labels) != len(steps):
        raise SettingError(
            "fields.labels",
            f"{where}: {len(labels)} labels of {len(steps)} steps; give one label for each step "
            "(null: not labelled), or remove the row",
        )
    marks = tuple(
        _label(label, f"{where}: column {columns['labels']!r}, step {number}")
        for number, label in enumerate(labels, start=1)
    )
    return (LabelledSolution(index, prompt, steps, marks),)


def _of_prm800k(row: Row, index: int, where: str, neutral: NeutralLabel) -> list[LabelledSolution]:
    """The solutions of a row of PRM800K, the chosen one last."""
    problem = value_at(row, "question.problem")
    if problem is None:
        raise missing_column(row, "question.problem", "prompt", where)
    prompt = _prompt(problem, f"{where}: question.problem", "prompt")
    solutions: list[LabelledSolution] = []
    before: list[str] = []
    labels: list[float | None] = []
    steps = value_at(row, "label.steps") or []  # of a problem that was reported as broken
    if not isinstance(steps, list):
        what = f"{where}: label.steps is a {type(steps).__name__}; needs a list"
        raise SettingError("fields.completions", what)
    for number, step in enumerate(steps, start=1):
        here = f"{where}: label.steps, step {number}"
        if not isinstance(step, Mapping):
            raise SettingError("fields.completions", f"{here} is a {type(step).__name__}")
        options, chosen = step.get("completions") or [], step.get("chosen_completion")
        human = step.get("human_completion")
        for option, completion in enumerate(options):
            if option != chosen:
                text, label = _rated(completion, here, neutral)
                unlabelled = (None,) * len(before)
                texts = (*before, text)
                solutions.append(LabelledSolution(index, prompt, texts, (*unlabelled, label)))
        if chosen is not None:
            if not isinstance(chosen, int) or not 0 <= chosen < len(options):
                raise SettingError(
                    "fields.completions",
                    f"{here}: chosen_completion = {chosen!r} of {len(options)} completions",
                )
            text, label = _rated(options[chosen], here, neutral)
        elif human is not None:  # written by the labeller, to be right
            written = {"text": human} if isinstance(human, str) else human
            (text, _), label = _rated(written, f"{here}, human_completion", neutral), 1.0
        else:
            break  # the solution ends where no completion was good
        before.append(text)
        labels.append(label)
    if before or not solutions:  # a labeller who gave up at once left no step
        solutions.append(LabelledSolution(index, prompt, tuple(before), tuple(labels)))
    return solutions


def _rated(completion: object, where: str, neutral: NeutralLabel) -> tuple[str, float | None]:
    """Text and label of a completion of PRM800K."""
    if not isinstance(completion, Mapping):
        raise SettingError(
            "fields.completions", f"{where}: a completion is a {type(completion).__name__}"
        )
    text, rating = _step(completion.get("text"), where), completion.get("rating")
    if rating is None:
        return text, None
    if rating not in (-1, 0, 1):
        raise SettingError("fields.completions", f"{where}: rating = {rating!r}; needs -1, 0 or 1")
    return text, {-1: 0.0, 0: neutral, 1: 1.0}[rating]


def _list(value: object, where: str, columns: Mapping[str, str], field: str) -> Sequence[object]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and value:
        return value
    found = "an empty list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
    raise SettingError(
        f"fields.{field}",
        f"{where}: column {columns[field]!r} (for {field}) is {found}; needs a list with an entry "
        "for each step",
    )


def _prompt(value: object, where: str, field: str) -> str:
    try:
        history, text = as_prompt(value, where)
    except ValueError as error:
        raise SettingError(f"fields.{field}", str(error)) from error
    if history:
        problem = f"{where} has several messages; needs one of the user"
        raise SettingError(f"fields.{field}", problem)
    if not text.strip():
        raise SettingError(f"fields.{field}", f"{where} is empty; fill it or remove the row")
    return text


def _step(value: object, where: str) -> str:
    try:
        text = as_text(value, where)
    except ValueError as error:
        raise SettingError("fields.completions", str(error)) from error
    if not text.strip():
        problem = f"{where} is empty; remove the step and its label, or the row"
        raise SettingError("fields.completions", problem)
    return text


def _label(value: object, where: str) -> float | None:
    if value is None:
        return None
    # Truth values, of NumPy too, and numbers; no text, as bool("false") is true.
    if isinstance(value, bool | int | float | np.bool_ | np.number) and 0 <= float(value) <= 1:
        return float(value)
    rating = " (PRM800K's ratings are read in its form alone)" if value == -1 else ""
    raise SettingError(
        "fields.labels",
        f"{where}: label = {value!r}; needs true or false, a number in 0..1, or null{rating}",
    )


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSolution:
    """A row ready for a process reward model.

    tokens: int32 [tokens] of prompt and solution. ends: int32 [steps], the index of each step's
    last token. labels: float32 [steps]; nan: not labelled.
    """

    id: int
    tokens: np.ndarray
    ends: np.ndarray
    labels: np.ndarray

    @property
    def longest(self) -> int:
        return len(self.tokens)

    def parts(self) -> tuple[bytes, ...]:
        return id_bytes(self.tokens), id_bytes(self.ends), self.labels.tobytes()


def encode_solutions(
    prompts: Sequence[str], texts: Sequence[str], section: DataSection, steps: TokenSteps
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What a process reward model reads, and where the steps end: int32 [tokens], int32 [steps].

    The prompt (a question for each text) is rendered by the section's template, less a prefilled
    `<think>`, which the text brings itself. Prompt and text are encoded apart, as sampled ids
    follow a prompt's ids, and no EOS follows: the last step is scored at the last token of its
    text. `max_prompt_tokens` has no effect. A text without visible characters has no step.

    Raises ValueError: the template does not apply, or the tokenizer cannot encode a text.
    """
    check_template(section)
    tokenizer = steps.tokenizer
    distinct = list(dict.fromkeys(prompts))
    whole = [render_prompt(prompt, section, tokenizer) for prompt in distinct]
    rendered = [text.removesuffix(prefill) for text, prefill in whole]
    opening = dict(zip(distinct, encode_texts(rendered, tokenizer), strict=True))
    rows = []
    for prompt, ids in zip(prompts, solution_tokens(texts, tokenizer), strict=True):
        before = opening[prompt]
        ends = np.asarray(steps.ends(ids), np.int32) + len(before)
        rows.append((np.asarray([*before, *ids], np.int32), ends.astype(np.int32)))
    return rows


def solution_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of solutions in rows of `encode_solutions`: without an EOS."""
    eos = str(tokenizer.eos_token) if tokenizer.eos_token else ""
    return encode_texts([text.removesuffix(eos) for text in texts], tokenizer)


def encode_step_labels(
    rows: Sequence[LabelledSolution],
    section: DataSection,
    rule: StepRule,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
) -> tuple[list[EncodedSolution], str]:
    """Renders and encodes every row; also a sentence that counts those kept and dropped, and why.

    A solution is dropped where it is longer than `max_tokens`, where no step is labelled, and
    where the rule cuts its text otherwise than it is labelled, as a step with a separator within:
    what is learnt at other tokens than those that are scored later would be of no use.

    Raises ValueError: no row is left (with the count of each reason), or as `encode_solutions`.
    """
    kept: list[EncodedSolution] = []
    dropped = {"cut into other steps by step_rule": 0, "too long": 0, "without a label": 0}
    labelled = [row for row in rows if any(label is not None for label in row.labels)]
    dropped["without a label"] = len(rows) - len(labelled)
    cutter, longest = TokenSteps(tokenizer, rule), 0
    example = ""
    for start in range(0, len(labelled), _BATCH):
        batch = labelled[start : start + _BATCH]
        texts = [join_steps(row.steps, rule) for row in batch]
        encoded = encode_solutions([row.prompt for row in batch], texts, section, cutter)
        for row, (tokens, ends) in zip(batch, encoded, strict=True):
            longest = max(longest, len(tokens))
            labels = np.asarray([math.nan if x is None else x for x in row.labels], np.float32)
            if len(ends) != len(labels):
                dropped["cut into other steps by step_rule"] += 1
                example = example or f"row {row.id}: {len(labels)} labels, {len(ends)} steps"
            elif len(tokens) > max_tokens:
                dropped["too long"] += 1
            else:
                kept.append(EncodedSolution(row.id, tokens, ends, labels))
    reasons = ", ".join(f"{count} {what}" for what, count in dropped.items() if count)
    report = f"{len(kept)} of {len(rows)} labelled solutions, the longest has {longest} tokens"
    report += f"; dropped: {reasons}" if reasons else ""
    report += f" ({example})" if example else ""
    if not kept:
        raise SettingError("source", f"nothing is left to learn from: {report}")
    return kept, report


def check_both_labels(rows: Sequence[EncodedSolution]) -> None:
    """Raises SettingError unless there are right and wrong steps, by one half."""
    labels = np.concatenate([row.labels for row in rows])
    labels = labels[~np.isnan(labels)]
    right = int((labels >= 0.5).sum())
    if right in (0, len(labels)):
        raise SettingError(
            "source",
            f"all {len(labels)} labelled steps are {'right' if right else 'wrong'}: nothing tells "
            "right steps from wrong ones, and their AUC is not defined. Add rows with both",
        )


def step_arrays(rows: Sequence[EncodedSolution], row_tokens: int) -> dict[str, np.ndarray]:
    """`tokens`, `positions` and `segment_ids` of `pad_texts`, and at the ends of labelled steps
    `labels` and a 1 in `labelled`; both float32 [rows, row_tokens].
    """
    arrays = pad_texts([row.tokens for row in rows], row_tokens)
    del arrays["ends"]
    labels = np.zeros((len(rows), row_tokens), np.float32)
    labelled = np.zeros_like(labels)
    for index, row in enumerate(rows):
        known = ~np.isnan(row.labels)
        labels[index, row.ends[known]] = row.labels[known]
        labelled[index, row.ends[known]] = 1
    return {**arrays, "labels": labels, "labelled": labelled}
