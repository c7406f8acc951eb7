"""Reads a dataset of the config as a sequence of `Example`, or of another type of row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast, get_args, overload

import numpy as np

from r1jax.data import livecodebench
from r1jax.data.choices import lettered
from r1jax.data.example import Example, Message, Role, Split, split_of
from r1jax.data.sources import Row, Rows, read_hub, read_jsonl, read_tfds
from r1jax.data.tasks import TASKS, Task, task_options
from r1jax.files import JsonObject
from r1jax.settings.names import nearest

if TYPE_CHECKING:
    from r1jax.settings.data import DataSection

TASK_EXAMPLES = 100_000
"""Examples of a `task:NAME` without `limit`; a task has no end."""

T = TypeVar("T")

_FIELDS = ("prompt", "answer", "text", "domain", "response", "messages")


def load_examples(section: DataSection) -> Sequence[Example]:
    """The examples of one dataset section, in the source's order.

    `task:`, `tfds:` and `hf:` examples are made when they are indexed, and not kept. With
    `held_out_fraction` all prompts are read once, to split the rows by a hash of each.

    Raises:
        ValueError: the source, the split, a field or an option is unknown, a row cannot be read
            (the message says which), or no rows are left.
        FileNotFoundError: `jsonl:PATH` does not exist.
        ImportError: the source needs a package that is not installed.
    """
    kind, _, name = str(section.source).partition(":")
    if kind == "task" and name:
        return _task_examples(section)
    return load_rows(section, _mapping, _problem)


class _LazyRows(Sequence[T]):
    """Rows that are made by a function of their index when they are read."""

    def __init__(self, make: Callable[[int], T], indices: Sequence[int]) -> None:
        self._make = make
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> _LazyRows[T]: ...
    def __getitem__(self, at: int | slice) -> T | _LazyRows[T]:
        if isinstance(at, slice):
            return _LazyRows(self._make, self._indices[at])
        return self._make(self._indices[at])


def load_task_rows(
    section: DataSection, mapping: Callable[[Task], Callable[[int, Split], T]]
) -> Sequence[T]:
    """The rows of a `task:` source, made when they are indexed.

    Args:
        mapping: From the task to a function of an index and a split, which makes a row.

    Raises:
        ValueError: the task, the split or an option is unknown, or a setting has no effect.
    """
    where = f"source = {section.source!r}"
    name = str(section.source).removeprefix("task:")
    if name not in TASKS:
        raise ValueError(f"{where}: no task {name!r}; known: {', '.join(sorted(TASKS))}")
    for setting in ("fields", "answer_pattern", "held_out_fraction", "wrong_answers", "row_format"):
        if getattr(section, setting):
            raise ValueError(
                f"{where}: {setting} = {getattr(section, setting)!r} has no effect on a task; "
                "remove it (a task makes its own fields and splits)"
            )
    if section.split not in get_args(Split):
        raise ValueError(f"{where}: split = {section.split!r}; a task has train and held_out")
    split = cast(Split, section.split)
    make = mapping(task_options(TASKS[name], section.options, where))
    rows = _LazyRows(lambda index: make(index, split), range(section.limit or TASK_EXAMPLES))
    rows[0]  # a task without rows of this type raises now, not after the first compilation
    return rows


def _task_examples(section: DataSection) -> Sequence[Example]:
    def mapping(task: Task) -> Callable[[int, Split], Example]:
        def make(index: int, split: Split) -> Example:
            example = task.example(index, split)
            return replace(example, domain=section.domain) if section.domain else example

        return make

    return load_task_rows(section, mapping)


# A reader gets the name after the colon, the split and the section's options.
_Reader = Callable[[str, str, JsonObject], Rows]
_READERS: Mapping[str, _Reader] = {"jsonl": read_jsonl, "tfds": read_tfds, "hf": read_hub}


def load_rows(
    section: DataSection,
    mapping: Callable[[DataSection, Rows], Callable[[int], T]],
    problem: Callable[[T], str],
) -> Sequence[T]:
    """The rows of one split of a `tfds:`, `jsonl:` or `hf:` source, in its order.

    Args:
        mapping: From the section and its source to a function of an index, which makes a row.
        problem: The text that a row is split by; rows of equal problems fall on the same side.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `load_examples`.
    """
    kind, _, name = str(section.source).partition(":")
    if kind not in _READERS or not name:
        raise ValueError(
            f"source = {section.source!r}: needs tfds:NAME, jsonl:PATH, hf:NAME or task:NAME"
        )
    options = dict(section.options)
    fraction = section.held_out_fraction
    split = section.split
    if fraction > 0:
        if split not in ("train", "held_out"):
            raise ValueError(
                f"source = {section.source!r}: split = {split!r} with held_out_fraction = "
                f"{fraction:g}; the split must be train or held_out (options.from_split names the "
                "source's own split that is divided)"
            )
        split = str(options.pop("from_split", "train"))
    rows = _READERS[kind](name, split, options)
    count = len(rows.rows)
    to_row = mapping(section, rows)
    indices: Sequence[int] = range(count)
    if fraction > 0:
        indices = [i for i in indices if split_of(problem(to_row(i)), fraction) == section.split]
    indices = indices[: section.limit]
    if not indices:
        raise ValueError(
            f"source = {section.source!r}: split = {section.split!r} has no rows"
            + (f" of the {count} with held_out_fraction = {fraction:g}" if fraction else "")
        )
    lazy = _LazyRows(to_row, indices)
    if rows.in_memory:
        return list(lazy)
    lazy[0]  # a wrong column or pattern raises now, not after the first compilation
    return lazy


def _mapping(section: DataSection, rows: Rows) -> Callable[[int], Example]:
    """A function of a row's index to its example, by `fields` and `answer_pattern`."""
    where = f"source = {section.source!r}"
    columns = columns_of(section, _FIELDS)
    named = set(section.fields)
    # With one kind of conversation in `fields`, a column of the other is not meant.
    if len(named & {"response", "messages"}) == 1:
        columns.pop("messages" if "response" in named else "response")
    # Pretraining text needs no other field.
    text_alone = "text" in named and not named & {"prompt", "answer", "response"}
    pattern = _compiled(section)

    def to_example(index: int) -> Example:
        row, here = rows.rows[index], f"{where}: {rows.label(index)}"
        if section.row_format == "livecodebench":
            row = _of_livecodebench(row, here)
        present = {field for field, column in columns.items() if row.get(column) is not None}
        required = named if text_alone else named | _needed(present | named)
        if missing := [field for field in _FIELDS if field in required - present]:
            raise missing_column(row, columns[missing[0]], missing[0], here)
        messages: tuple[Message, ...] = ()
        if "messages" in present:
            column = columns["messages"]
            messages = _as_messages(row[column], f"{here}: column {column!r}")
        values = {
            field: as_text(row[column], f"{here}: column {column!r}", structured=field == "answer")
            for field, column in columns.items()
            if field in present - {"messages"}
        }
        answer = values.get("answer", "")
        if pattern is not None:
            matches = list(pattern.finditer(answer))
            if not matches:
                raise ValueError(
                    f"{here}: answer_pattern = {pattern.pattern!r} does not occur in the "
                    f"answer, which ends in {answer[-80:]!r}"
                )
            answer = (matches[-1].group(1) or "").strip()
        if section.wrong_answers:
            wrong = [
                _column(row, column, "wrong_answers", here) for column in section.wrong_answers
            ]
            values["prompt"], answer = lettered(values.get("prompt", ""), answer, wrong)
        opening = next((m.content for m in messages if m.role == "user"), "")
        return Example(
            id=index,
            prompt=values.get("prompt", opening),
            answer=answer,
            text=values.get("text"),
            domain=section.domain or values.get("domain", ""),
            response=values.get("response"),
            messages=messages,
        )

    return to_example


def _of_livecodebench(row: Row, where: str) -> Row:
    texts = {column: _column(row, column, "row_format", where) for column in livecodebench.COLUMNS}
    try:
        prompt, answer = livecodebench.prompt_and_answer(texts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {**row, "prompt": prompt, "answer": answer}


def _column(row: Row, column: str, setting: str, where: str) -> str:
    if row.get(column) is None:
        raise ValueError(f"{where}: {_no_column(row, column, setting)}")
    return as_text(row[column], f"{where}: column {column!r}")


def _no_column(row: Row, column: str, setting: str) -> str:
    state = "is null" if column in row else "does not exist"
    return f"column {column!r} (for {setting}) {state}; the row has {_keys(row)}"


def _keys(mapping: Mapping[str, object]) -> str:
    return ", ".join(sorted(map(str, mapping)))


def _needed(fields: set[str]) -> set[str]:
    """The fields that a row must have, given those that it has or that the section names.

    A question needs an answer to compare with, unless it comes with a response.
    """
    if "messages" in fields:
        return set()
    return {"prompt"} if "response" in fields else {"prompt", "answer"}


def columns_of(section: DataSection, known: Sequence[str]) -> dict[str, str]:
    """Field -> column, by the section's `fields`; ValueError if they map one that is not known."""
    for field in section.fields:
        if field not in known:
            raise ValueError(
                f"source = {section.source!r}: fields.{field}: {nearest(field, known)}known: "
                f"{', '.join(known)}"
            )
    return {field: section.fields.get(field, field) for field in known}


def missing_column(row: Row, column: str, field: str, where: str) -> ValueError:
    """The error of a row without a value in a column that it needs."""
    missing = _no_column(row, column, field)
    return ValueError(f"{where}: {missing}. Map it with fields: {{{field}: COLUMN}}.")


def _problem(example: Example) -> str:
    """The text that a row is split by: its question or, without one, its pretraining text."""
    return example.prompt or example.text or ""


def as_text(value: object, where: str, *, structured: bool = False) -> str:
    """The text of a column; TFDS gives text as bytes and numbers as NumPy scalars.

    With `structured`, lists and mappings (a puzzle's solution, a program's tests) become JSON.
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic | np.ndarray) and value.ndim == 0:
        value = value.item()
        return value.decode() if isinstance(value, bytes) else str(value)
    if isinstance(value, (str, int, float)):
        return str(value)
    if structured and isinstance(value, (list, Mapping)):
        return json.dumps(value, ensure_ascii=False)
    raise ValueError(f"{where} is a {type(value).__name__}; needs text or a number")


def _as_messages(value: object, where: str) -> tuple[Message, ...]:
    """A conversation from a list of {role, content}; other keys of a message are ignored."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is a {type(value).__name__}; needs a list of {{role, content}}")
    messages = []
    for number, entry in enumerate(value):
        here = f"{where}, message {number}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{here} is a {type(entry).__name__}; needs {{role, content}}")
        for key in ("role", "content"):
            if entry.get(key) is None:
                state = "null" if key in entry else "no"
                raise ValueError(f"{here} has {state} {key}; it has {_keys(entry)}")
        role = as_text(entry["role"], f"{here}: role")
        if role not in get_args(Role):
            raise ValueError(
                f"{here}: role = {role!r}; known: {', '.join(get_args(Role))}. Rename it, or "
                "remove the row."
            )
        content = as_text(entry["content"], f"{here}: content")
        messages.append(Message(cast(Role, role), content))
    if not any(message.role == "user" for message in messages):
        raise ValueError(f"{where} has no user message; remove the row")
    return tuple(messages)


def _compiled(section: DataSection) -> re.Pattern[str] | None:
    if section.answer_pattern is None:
        return None
    try:
        pattern = re.compile(section.answer_pattern)
    except re.error as error:
        raise ValueError(f"answer_pattern = {section.answer_pattern!r}: {error}") from error
    if pattern.groups < 1:
        raise ValueError(
            f"answer_pattern = {section.answer_pattern!r} has no group; put the answer in ( )"
        )
    return pattern
