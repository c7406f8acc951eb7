"""Reads a dataset named in the config as a sequence of `Example`, or of another kind of row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, overload

from r1jax.data import livecodebench
from r1jax.data.choices import lettered
from r1jax.data.example import Example, Message, Role, Split, split_of
from r1jax.data.sources import Row, Rows, read_hub, read_jsonl, read_tfds
from r1jax.data.tasks import TASKS, Task, task_options
from r1jax.settings.names import nearest

if TYPE_CHECKING:
    from r1jax.settings.data import DataSection

TASK_EXAMPLES = 100_000
"""Examples of a `task:NAME` without `limit`; a task has no end of its own."""

T = TypeVar("T")

_FIELDS = ("prompt", "answer", "text", "domain", "response", "messages")


def load_examples(section: DataSection) -> Sequence[Example]:
    """The examples of one dataset section, in the source's order.

    `task:`, `tfds:` and `hf:` examples are made when they are indexed, and not kept. With
    `held_out_fraction` the prompts are read once, to split the rows by a hash of each.

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


class LazyRows(Sequence[T]):
    """Rows made by a function of an index when asked for."""

    def __init__(self, make: Callable[[int], T], indices: Sequence[int]) -> None:
        self._make = make
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> LazyRows[T]: ...
    def __getitem__(self, at: int | slice) -> T | LazyRows[T]:
        if isinstance(at, slice):
            return LazyRows(self._make, self._indices[at])
        return self._make(self._indices[at])


def load_task_rows(
    section: DataSection, mapping: Callable[[Task], Callable[[int, Split], T]]
) -> Sequence[T]:
    """The rows of a `task:` source, made when they are indexed.

    Args:
        mapping: Makes, of the task, the function of an index and a split to a row.

    Raises:
        ValueError: the task, the split or an option is unknown, or a setting has no effect.
    """
    where = f"source = {section.source!r}"
    name = str(section.source).removeprefix("task:")
    if name not in TASKS:
        raise ValueError(f"{where}: no task {name!r}; known: {', '.join(sorted(TASKS))}")
    for setting in (
        "fields",
        "answer_pattern",
        "held_out_fraction",
        "wrong_answers",
        "row_format",
    ):
        if getattr(section, setting):
            raise ValueError(
                f"{where}: {setting} = {getattr(section, setting)!r} has no effect on a task; "
                "remove it (a task makes its own fields and splits)"
            )
    if section.split not in get_args(Split):
        raise ValueError(f"{where}: split = {section.split!r}; a task has train and held_out")
    split = cast(Split, section.split)
    make = mapping(task_options(TASKS[name], section.options, where))
    rows = LazyRows(lambda index: make(index, split), range(section.limit or TASK_EXAMPLES))
    rows[0]  # a task that has no rows of this kind says so now, not after the first compilation
    return rows


def _task_examples(section: DataSection) -> Sequence[Example]:
    def mapping(task: Task) -> Callable[[int, Split], Example]:
        def make(index: int, split: Split) -> Example:
            example = task.example(index, split)
            return replace(example, domain=section.domain) if section.domain else example

        return make

    return load_task_rows(section, mapping)


# A reader gets the name after the colon, the split and the section's options.
_Reader = Callable[[str, str, Mapping[str, Any]], Rows]
_READERS: Mapping[str, _Reader] = {"jsonl": read_jsonl, "tfds": read_tfds, "hf": read_hub}


def load_rows(
    section: DataSection,
    mapping: Callable[[DataSection, Rows], Callable[[int], T]],
    problem: Callable[[T], str],
) -> Sequence[T]:
    """The rows of one split of a `tfds:`, `jsonl:` or `hf:` source, in its order.

    Args:
        mapping: Makes, of the section and its source, the function of an index to a row.
        problem: What a row is split by; rows of equal problems fall on the same side.

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
    lazy = LazyRows(to_row, indices)
    if rows.in_memory:
        return list(lazy)
    # Rows that are read later can only be checked later, but a wrong column or pattern is wrong
    # in the first row already: better now than after the first compilation.
    lazy[0]
    return lazy


def _mapping(section: DataSection, rows: Rows) -> Callable[[int], Example]:
    """A function of a row's index to its example, by `fields` and `answer_pattern`."""
    where = f"source = {section.source!r}"
    columns = columns_of(section, _FIELDS)
    named = set(section.fields)
    # Whoever names one kind of conversation does not mean a column that happens to be there.
    if len(named & {"response", "messages"}) == 1:
        columns.pop("messages" if "response" in named else "response")
    # Pretraining text may come alone.
    text_alone = "text" in named and not named & {"prompt", "answer", "response"}
    pattern = _compiled(section)

    def to_example(index: int) -> Example:
        row, place = rows.rows[index], f"{where}: {rows.label(index)}"
        if section.row_format == "livecodebench":
            row = _of_livecodebench(row, place)
        present = {field for field, column in columns.items() if row.get(column) is not None}
        required = named if text_alone else named | _needed(present | named)
        if missing := [field for field in _FIELDS if field in required - present]:
            raise missing_column(row, columns[missing[0]], missing[0], place)
        messages: tuple[Message, ...] = ()
        if "messages" in present:
            column = columns["messages"]
            messages = _as_messages(row[column], f"{place}: column {column!r}")
        values = {
            field: as_text(row[column], f"{place}: column {column!r}", structured=field == "answer")
            for field, column in columns.items()
            if field in present - {"messages"}
        }
        answer = values.get("answer", "")
        if pattern is not None:
            matches = list(pattern.finditer(answer))
            if not matches:
                raise ValueError(
                    f"{place}: answer_pattern = {pattern.pattern!r} does not occur in the "
                    f"answer, which ends in {answer[-80:]!r}"
                )
            answer = (matches[-1].group(1) or "").strip()
        if section.wrong_answers:
            wrong = [
                _column(row, column, "wrong_answers", place) for column in section.wrong_answers
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


def _of_livecodebench(row: Row, place: str) -> Row:
    texts = {column: _column(row, column, "row_format", place) for column in livecodebench.COLUMNS}
    try:
        prompt, answer = livecodebench.prompt_and_answer(texts)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return {**row, "prompt": prompt, "answer": answer}


def _column(row: Row, column: str, setting: str, place: str) -> str:
    if row.get(column) is None:
        raise ValueError(f"{place}: {_no_column(row, column, setting)}")
    return as_text(row[column], f"{place}: column {column!r}")


def _no_column(row: Row, column: str, setting: str) -> str:
    state = "is null" if column in row else "does not exist"
    found = ", ".join(sorted(map(str, row)))
    return f"column {column!r} (for {setting}) {state}; the row has {found}"


def _needed(fields: set[str]) -> set[str]:
    """The fields that a row must have, given those it has or is said to have.

    A question always has an answer to be compared with, unless it comes with what to say to it.
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


def missing_column(row: Row, column: str, field: str, place: str) -> ValueError:
    """The error of a row that has nothing in a column that it needs."""
    missing = _no_column(row, column, field)
    return ValueError(f"{place}: {missing}. Map it with fields: {{{field}: COLUMN}}.")


def _problem(example: Example) -> str:
    """What a row is split by: its question, or its text where it has nothing else."""
    return example.prompt or example.text or ""


def as_text(value: Any, where: str, *, structured: bool = False) -> str:
    """Text of a column; TFDS gives text as bytes and numbers as NumPy scalars.

    With `structured`, lists and mappings (a puzzle's solution, a program's tests) become JSON.
    """
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
        return value.decode() if isinstance(value, bytes) else str(value)
    if isinstance(value, (str, int, float)):
        return str(value)
    if structured and isinstance(value, (list, Mapping)):
        return json.dumps(value, ensure_ascii=False)
    raise ValueError(f"{where} is a {type(value).__name__}; needs text or a number")


def _as_messages(value: Any, where: str) -> tuple[Message, ...]:
    """A conversation from a list of {role, content}; other keys of a message are left alone."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is a {type(value).__name__}; needs a list of {{role, content}}")
    messages = []
    for number, entry in enumerate(value):
        place = f"{where}, message {number}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{place} is a {type(entry).__name__}; needs {{role, content}}")
        for key in ("role", "content"):
            if entry.get(key) is None:
                found = ", ".join(sorted(map(str, entry)))
                state = "null" if key in entry else "no"
                raise ValueError(f"{place} has {state} {key}; it has {found}")
        role = as_text(entry["role"], f"{place}: role")
        if role not in get_args(Role):
            raise ValueError(
                f"{place}: role = {role!r}; known: {', '.join(get_args(Role))}. Rename it, or "
                "remove the row."
            )
        content = as_text(entry["content"], f"{place}: content")
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
