"""Reads a dataset of the config as a sequence of `Example`, or of another type of row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast, get_args, overload

import numpy as np

from r1jax.bucket import locate
from r1jax.data import livecodebench
from r1jax.data.choices import lettered
from r1jax.data.example import Example, Message, Role, Split, split_of
from r1jax.data.gym import read_gym
from r1jax.data.limits import find_all
from r1jax.data.sources import Row, Rows, read_hub, read_jsonl, read_tfds
from r1jax.data.tasks import TASKS, Task, task_options
from r1jax.files import JsonObject, plain_json
from r1jax.settings.names import nearest
from r1jax.settings.section import SettingError

if TYPE_CHECKING:
    from r1jax.settings.data import DataSection

TASK_EXAMPLES = 100_000
"""Examples of a `task:NAME` without `limit`; a task has no end."""

T = TypeVar("T")

_FIELDS = ("prompt", "answer", "text", "domain", "response", "messages")


def load_examples(section: DataSection) -> Sequence[Example]:
    """The examples of one dataset section, in the source's order.

    `task:`, `tfds:`, `hf:` and `gym:` examples are made when they are indexed, and not kept. With
    `held_out_fraction` all prompts are read once, to split the rows by a hash of each.

    Raises:
        SettingError: the source, the split, a field or an option is unknown, a package is missing,
            a row cannot be read (the message says which), or no rows are left.
        FileNotFoundError: `jsonl:PATH` does not exist.
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
        SettingError: the task, the split or an option is unknown, or a setting has no effect.
    """
    name = str(section.source).removeprefix("task:")
    if name not in TASKS:
        raise SettingError("source", f"no task {name!r}; known: {', '.join(sorted(TASKS))}")
    for setting in ("fields", "answer_pattern", "held_out_fraction", "wrong_answers", "row_format"):
        if getattr(section, setting):
            problem = "has no effect on a task, which makes its own fields and splits; remove it"
            raise SettingError(setting, problem)
    if section.split not in get_args(Split):
        raise SettingError("split", "a task has train and held_out")
    split = cast(Split, section.split)
    make = mapping(task_options(TASKS[name], section.options))
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
_READERS: Mapping[str, _Reader] = {
    "jsonl": read_jsonl,
    "tfds": read_tfds,
    "hf": read_hub,
    "gym": read_gym,
}


def load_rows(
    section: DataSection,
    mapping: Callable[[DataSection, Rows], Callable[[int], T]],
    problem: Callable[[T], str],
) -> Sequence[T]:
    """The rows of one split of a `tfds:`, `jsonl:`, `hf:` or `gym:` source, in its order.

    Args:
        mapping: From the section and its source to a function of an index, which makes a row.
        problem: The text that a row is split by; rows of equal problems fall on the same side.

    Raises:
        SettingError: as `load_examples`.
    """
    kind, _, name = str(section.source).partition(":")
    if kind not in _READERS or not name:
        raise SettingError(
            "source",
            f"{section.source!r}: needs tfds:NAME, jsonl:PATH, hf:NAME or task:NAME, or gym:NAME",
        )
    options = dict(section.options)
    fraction = section.held_out_fraction
    split = section.split
    if fraction > 0:
        if split not in ("train", "held_out"):
            raise SettingError(
                "split",
                f"with held_out_fraction = {fraction:g} it must be train or held_out "
                "(options.from_split names the source's own split that is divided)",
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
        raise SettingError(
            "source",
            f"split = {section.split!r} has no rows"
            + (f" of the {count} with held_out_fraction = {fraction:g}" if fraction else ""),
        )
    lazy = _LazyRows(to_row, indices)
    if rows.in_memory:
        return list(lazy)
    lazy[0]  # a wrong column or pattern raises now, not after the first compilation
    return lazy


def _mapping(section: DataSection, rows: Rows) -> Callable[[int], Example]:
    """A function of a row's index to its example, by `fields` and `answer_pattern`."""
    columns = columns_of(section, _FIELDS)
    named = {field for field, column in section.fields.items() if column is not None}
    # A column that the section names for one field is not another field, whatever it is called.
    for field in set(columns) - named:
        if columns[field] in section.fields.values():
            columns.pop(field)
    # With one kind of conversation in `fields`, a column of the other is not meant.
    if len(named & {"response", "messages"}) == 1:
        columns.pop("messages" if "response" in named else "response", None)
    # Pretraining text needs no other field.
    text_alone = "text" in named and not named & {"prompt", "answer", "response"}
    pattern = _compiled(section)
    # Where some columns are named, an optional one that cannot be read is only called so.
    meant = named | {"prompt", "answer"} if named else set(_FIELDS) - {"domain"}

    def to_example(index: int) -> Example:
        row, here = rows.rows[index], rows.label(index)
        kept = row
        if section.row_format == "livecodebench":
            # Its tests may be megabytes, and are in the answer.
            kept = {name: row[name] for name in row if name not in livecodebench.COLUMNS}
            row = _of_livecodebench(row, here)
        values: dict[str, str] = {}
        messages: tuple[Message, ...] = ()
        history: tuple[Message, ...] = ()
        for field, column in columns.items():
            value, where = value_at(row, column), f"{here}: column {column!r}"
            if value is None:
                continue
            try:
                if field == "messages":
                    messages = as_messages(value, where)
                elif field == "prompt":
                    history, values[field] = as_prompt(value, where)
                elif field == "response":
                    values[field] = as_response(value, where)
                elif field != "domain" or field in named or isinstance(value, _LABELS):
                    values[field] = as_text(value, where, structured=field == "answer")
            except ValueError as error:
                if field in meant:
                    raise SettingError(_key_of(field, section), str(error)) from error
        present = set(values) | ({"messages"} if messages else set())
        required = named if text_alone else named | _needed(present | named)
        if missing := [field for field in _FIELDS if field in required - present]:
            raise missing_column(row, columns.get(missing[0], missing[0]), missing[0], here)
        answer = values.get("answer", "")
        if pattern is not None:
            try:
                matches = find_all(pattern, answer, "answer_pattern")
            except SettingError as error:
                raise SettingError(error.key, f"{here}: {error.problem}") from None
            if not matches:
                raise SettingError(
                    "answer_pattern",
                    f"{here}: does not occur in the answer, which ends in {answer[-80:]!r}",
                )
            answer = (matches[-1].group(1) or "").strip()
        if section.wrong_answers:
            wrong = [
                _column(row, column, "wrong_answers", here) for column in section.wrong_answers
            ]
            try:
                values["prompt"], answer = lettered(values.get("prompt", ""), answer, wrong)
            except ValueError as error:
                raise SettingError("wrong_answers", f"{here}: {error}") from error
        opening = next((m.content for m in messages if m.role == "user"), "")
        return Example(
            id=index,
            prompt=values.get("prompt", opening),
            answer=answer,
            text=values.get("text"),
            domain=section.domain or values.get("domain", ""),
            response=values.get("response"),
            messages=messages,
            history=history,
            columns={} if text_alone else _json_columns(kept),
        )

    return to_example


def _key_of(field: str, section: DataSection) -> str:
    """The setting that says which column a field is."""
    return f"fields.{field}" if section.fields.get(field) is not None else "fields"


# A label is text (bytes in TFDS) or a number.
_LABELS = (str, bytes, int, float, np.generic)


def value_at(row: Row, column: str) -> object:
    """A column's value; `a.b` is the key b of the column a, where there is no column `a.b`."""
    value: object = row.get(column)
    if value is None and "." in column:
        value = row
        for key in column.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_turns(value: object) -> TypeGuard[Sequence[Mapping[str, object]]]:
    return isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value)


def as_prompt(value: object, where: str) -> tuple[tuple[Message, ...], str]:
    """The messages before a prompt, and the prompt: a text, or the last message of a conversation.

    Raises ValueError: neither, or the conversation does not end with the user.
    """
    if not _is_turns(value):
        return (), as_text(value, where)
    *history, last = as_messages(value, where)
    if last.role != "user":
        raise ValueError(
            f"{where} ends with a message of the {last.role}; a prompt ends with the user's. For "
            "supervised fine-tuning map it with fields: {messages: COLUMN}"
        )
    return tuple(history), last.content


def as_response(value: object, where: str, prompt: str | None = None) -> str:
    """A response: a text, or the assistant's message at the end of a conversation.

    prompt: what the user's message before it has to be, where there is one. Raises ValueError.
    """
    if not _is_turns(value) or not value:
        return as_text(value, where)
    *before, last = _messages(value, where)
    if last.role != "assistant":
        raise ValueError(f"{where} ends with a message of the {last.role}, not of the assistant")
    if before and prompt is not None and before[-1] != Message("user", prompt):
        raise ValueError(f"{where} answers another message than the prompt")
    return last.content


def _json_columns(row: Row) -> JsonObject:
    """The columns of a row that JSON can hold."""
    columns = {}
    for name in row:
        try:
            columns[str(name)] = plain_json(row[name])
        except (TypeError, ValueError):  # an image, say
            continue
    return columns


def row_label(section: DataSection, index: int) -> str:
    """The file and line, or the split and row, of the row at an index of a section's source."""
    kind, _, name = str(section.source).partition(":")
    path = locate(name).expanduser()
    if kind != "jsonl" or not path.is_file():
        return f"{section.split} row {index}"
    with path.open("rb") as file:
        lines = (number for number, line in enumerate(file, start=1) if line.strip())
        return f"{path}:{next(islice(lines, index, None))}"


def _of_livecodebench(row: Row, where: str) -> Row:
    texts = {column: _column(row, column, "row_format", where) for column in livecodebench.COLUMNS}
    try:
        prompt, answer = livecodebench.prompt_and_answer(texts)
    except ValueError as error:
        raise SettingError("row_format", f"{where}: {error}") from error
    return {**row, "prompt": prompt, "answer": answer}


def _column(row: Row, column: str, setting: str, where: str) -> str:
    value = value_at(row, column)
    if value is None:
        raise SettingError(setting, f"{where}: {_no_column(row, column, setting)}")
    return as_text(value, f"{where}: column {column!r}")


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
    """Field -> column, by the section's `fields`; SettingError if they map one that is not known.

    A field that they map to null is left out.
    """
    for field in section.fields:
        if field not in known:
            problem = f"{nearest(field, known)}known: {', '.join(known)}"
            raise SettingError(f"fields.{field}", problem)
    columns = {field: section.fields.get(field, field) for field in known}
    return {field: column for field, column in columns.items() if column is not None}


def missing_column(row: Row, column: str, field: str, where: str) -> SettingError:
    """The error of a row without a value in a column that it needs."""
    missing = _no_column(row, column, field)
    key = "fields" if column == field else f"fields.{field}"
    return SettingError(key, f"{where}: {missing}. Map it with fields: {{{field}: COLUMN}}.")


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


def as_messages(value: object, where: str) -> tuple[Message, ...]:
    """A conversation from a list of {role, content}; other keys of a message are ignored.

    So is one of {from, value} with the roles human and gpt. Raises ValueError: another form, or no
    message of a user.
    """
    messages = _messages(value, where)
    if not any(message.role == "user" for message in messages):
        raise ValueError(f"{where} has no user message; remove the row")
    return messages


_OTHER_ROLES = {"human": "user", "gpt": "assistant"}


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is a {type(value).__name__}; needs a list of {{role, content}}")
    messages = []
    for number, entry in enumerate(value):
        here = f"{where}, message {number}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{here} is a {type(entry).__name__}; needs {{role, content}}")
        keys, names = ("role", "content"), dict[str, str]()
        if "role" not in entry and {"from", "value"} <= entry.keys():
            keys, names = ("from", "value"), _OTHER_ROLES
        for key in keys:
            if entry.get(key) is None:
                state = "null" if key in entry else "no"
                raise ValueError(f"{here} has {state} {key}; it has {_keys(entry)}")
        role = as_text(entry[keys[0]], f"{here}: {keys[0]}")
        role = names.get(role, role)
        if role not in get_args(Role):
            raise ValueError(
                f"{here}: {keys[0]} = {role!r}; known: {', '.join((*get_args(Role), *names))}. "
                "Rename it, or remove the row."
            )
        content = as_text(entry[keys[1]], f"{here}: {keys[1]}")
        messages.append(Message(cast(Role, role), content))
    return tuple(messages)


def _compiled(section: DataSection) -> re.Pattern[str] | None:
    if section.answer_pattern is None:
        return None
    try:
        pattern = re.compile(section.answer_pattern)
    except re.error as error:
        raise SettingError("answer_pattern", str(error)) from error
    if pattern.groups < 1:
        raise SettingError("answer_pattern", "it has no group; put the answer in ( )")
    return pattern
