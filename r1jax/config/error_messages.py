"""Pydantic's errors as messages for the one who wrote the config."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from r1jax.config.expected import describe, expected_at, has, keys_at, named_values
from r1jax.config.other_names import other_name
from r1jax.config.yaml_file import KeyPath, show
from r1jax.files import JsonObject

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MOST_MISTAKES = 50  # that are said at once
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""Types of pydantic's errors for a key that a section does not have."""


def name_of(data: JsonObject, path: KeyPath) -> str:
    """`path` as a user would write it on the command line: stages by name."""
    parts: list[str] = []
    node: Any = data
    for key in path:
        node = node[key] if has(node, key) else None
        name = node.get("name") if isinstance(key, int) and isinstance(node, dict) else None
        parts.append(name if isinstance(name, str) else str(key))
    return ".".join(parts)


def messages(
    data: JsonObject, error: ValidationError, unknown_keys_only: bool = False
) -> list[tuple[KeyPath, str]]:
    """The errors of `data` as (key path, message), one for each wrong value; unknown keys first."""
    found: dict[KeyPath, ErrorDetails] = {}
    errors = error.errors(include_url=False)
    for details in sorted(errors, key=lambda each: each["type"] not in _UNKNOWN_KEY):
        found.setdefault(_key_path(data, details), details)
    wrong = []
    for path, details in list(found.items())[:MOST_MISTAKES]:
        if not path and details["type"] == "value_error":  # a rule between sections names a key
            path = _named_path(data, details["msg"].removeprefix("Value error, "))
        # Of a union, the alternatives that were not meant complain as well, higher up.
        below = any(other[: len(path)] == path for other in found if other != path)
        of_another = below and details["type"].endswith(("_type", "literal_error"))
        if not of_another and (details["type"] in _UNKNOWN_KEY or not unknown_keys_only):
            wrong.append((path, _message(data, path, details)))
    if len(found) > MOST_MISTAKES:
        wrong.append(((), f"and {len(found) - MOST_MISTAKES} more mistakes"))
    return wrong


def _named_path(data: JsonObject, message: str) -> KeyPath:
    """The longest path in `data` of the key that a message begins with; stages by name."""
    path: KeyPath = ()
    node: Any = data
    for part in re.split(r"[:,\s]", message, maxsplit=1)[0].split("."):
        key: str | int = part
        if isinstance(node, list):
            names = [each.get("name") if isinstance(each, dict) else None for each in node]
            key = names.index(part) if part in names else len(node)
        if not has(node, key):
            break
        node, path = node[key], (*path, key)
    return path


def _key_path(data: JsonObject, error: ErrorDetails) -> KeyPath:
    """An error's place without the names of union alternatives that pydantic puts in it."""
    path: KeyPath = ()
    node: Any = data
    location = error["loc"]
    if error["type"].startswith("union_tag"):
        named = error["ctx"]["discriminator"].strip("'")
        location = (*location, "kind" if named.endswith("()") else named)  # a function's: _kind()
    for index, key in enumerate(location):
        if has(node, key):
            node = node[key]
        elif index < len(location) - 1 or error["type"] not in _MISSING:
            continue
        path = (*path, key)
    return path


_MISSING = ("missing", "kind", "union_tag_not_found")
"""Types of errors that may be about a key that is not there."""


def _message(data: JsonObject, path: KeyPath, error: ErrorDetails) -> str:
    kind, name, value = error["type"], name_of(data, path), error["input"]
    if kind in _UNKNOWN_KEY:
        return f"{name} = {show(value)}: unknown key; {_meant_key(data, path)}"
    if kind == "value_error":
        # The settings' own rules name their keys from the section on.
        reason = error["msg"].removeprefix("Value error, ")
        return f"{name}: {reason}" if name and not reason.startswith(name) else reason
    if kind.startswith("union_tag"):
        value = value.get(path[-1]) if isinstance(value, dict) else None
    missing = kind in ("missing", "union_tag_not_found") or (kind == "kind" and value is None)
    given = f"{name} is missing" if missing else f"{name} = {show(value)}"
    named = ("missing", "int_from_float", "literal_error")
    if kind.endswith("_type") or kind.startswith("union_tag") or kind in named:
        expected = expected_at(data, path)
        near = difflib.get_close_matches(str(value), named_values(expected), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{given}: should be {describe(expected)}{hint}"
    # Bounds and patterns: pydantic's words say it ("Input should be greater than 0").
    return f"{given}: {error['msg'].removeprefix('Input ').removeprefix('String ')}"


def _meant_key(data: JsonObject, path: KeyPath) -> str:
    """What the writer of an unknown key may have meant."""
    key, section = str(path[-1]), path[:-1]
    if known := other_name(key, name_of(data, section)):
        return known
    keys = keys_at(data, section)
    # A right name at the wrong depth: learning_rate instead of optimizer.learning_rate.
    deeper = [f"{name}.{key}" for name in keys if key in keys_at(data, (*section, name))]
    near = [*difflib.get_close_matches(key, keys, n=1), *deeper]
    if not near:
        return f"known here: {', '.join(keys)}"
    expected = expected_at(data, (*section, *near[0].split(".")))
    return f"did you mean {near[0]} ({describe(expected)})?"
