"""What belongs at a key of a config, read off the classes of the settings."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from r1jax.config.run_config import RunConfig
from r1jax.config.yaml_file import KeyPath
from r1jax.files import JsonObject
from r1jax.settings.kinds import load_kind
from r1jax.settings.stage import Stage

_NOTHING = FieldInfo(annotation=Any)
"""Expected where nothing is known of a key."""


def has(data: object, key: str | int) -> bool:
    """Whether a mapping has this key, or a list this index."""
    if isinstance(data, list):
        return isinstance(key, int) and key < len(data)
    return isinstance(data, dict) and key in data


def stage_kinds(data: JsonObject) -> Iterator[tuple[int, JsonObject, type[Stage]]]:
    """(index, stage, its settings) of the stages in a config whose kind is known."""
    stages = data.get("stages")
    for index, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict):
            try:
                yield index, stage, load_kind(str(stage.get("kind")))
            except ValueError:  # refused where the config is validated
                continue


def expected_at(data: JsonObject, path: KeyPath) -> FieldInfo:
    """What belongs at `path`, where there is something or could be."""
    if not path:
        return FieldInfo(annotation=RunConfig)
    above = expected_at(data, path[:-1])
    kinds = [(get_origin(part), get_args(part)) for part in alternatives(above.annotation)]
    for origin, arguments in kinds:
        if origin is (list if isinstance(path[-1], int) else dict):
            return FieldInfo.from_annotation(arguments[-1])
    return keys_at(data, path[:-1]).get(str(path[-1]), _NOTHING)


def keys_at(data: JsonObject, path: KeyPath) -> dict[str, FieldInfo]:
    """The keys that the section at `path` may have."""
    value: Any = data
    for key in path:
        value = value[key] if has(value, key) else None
    kind = value.get("kind") if isinstance(value, dict) else None
    parts = [part for part in alternatives(expected_at(data, path).annotation) if keys_of(part)]
    if parts == [Stage]:
        parts = [each for _, stage, each in stage_kinds(data) if stage is value]
    elif len(parts) > 1:  # of different kinds
        kinds: list[Any] = [keys_of(part)["kind"].annotation for part in parts]
        outside = isinstance(kind, str) and ":" in kind
        parts = [
            part
            for part, each in zip(parts, kinds, strict=True)
            if kind in get_args(each) or (outside and each is str)
        ]
        if not parts:
            return {"kind": FieldInfo(annotation=functools.reduce(operator.or_, kinds))}
    return keys_of(parts[0]) if parts else {}


def default_at(data: JsonObject, path: KeyPath) -> JsonObject:
    """What a section that the config leaves out would have."""
    default = expected_at(data, path).get_default(call_default_factory=True, validated_data={})
    plain = to_jsonable_python(default, fallback=lambda _: None)
    return plain if isinstance(plain, dict) else {}


def named_values(field: FieldInfo) -> list[str]:
    """The values that a key may have by name."""
    parts = alternatives(field.annotation)
    return [str(v) for part in parts if get_origin(part) is Literal for v in get_args(part)]


def describe(field: FieldInfo, above: Sequence[object] = ()) -> str:
    """What belongs at a key, in words; `above` has the limits of the union that it is part of."""
    origin, arguments = get_origin(field.annotation), get_args(field.annotation)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, UnionType):
        parts = map(FieldInfo.from_annotation, arguments)
        return " or ".join(describe(part, field.metadata) for part in parts)
    if origin is list:
        return f"a list (each {describe(FieldInfo.from_annotation(arguments[0]))})"
    if origin is dict:
        return "a mapping"
    keys = keys_of(field.annotation)
    if keys:
        return f"a section with {', '.join(keys)}"
    limits = [
        f"{words} {getattr(limit, name):g}"
        for limit in (*field.metadata, *above)
        for name, words in _LIMITS.items()
        if hasattr(limit, name) and field.annotation in (int, float)
    ]
    return " ".join([_TYPES.get(field.annotation, "a value"), " and ".join(limits)]).rstrip()


_TYPES: dict[object, str] = {str: "text", int: "an integer", float: "a number"}
_TYPES |= {bool: "true or false", type(None): "null"}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def alternatives(annotation: object) -> list[type]:
    """The types that a union is made of; a type that is none, alone."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return alternatives(arguments[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for each in arguments for part in alternatives(each)]
    return [cast(type, annotation)]


def keys_of(section: object) -> dict[str, FieldInfo]:
    """The keys of a section; none for another type."""
    if not isinstance(section, type):
        return {}
    if issubclass(section, BaseModel):
        return section.model_fields
    if not dataclasses.is_dataclass(section):
        return {}
    types = get_type_hints(section, include_extras=True)
    fields = dataclasses.fields(section)
    return {f.name: _field_info(types[f.name], f) for f in fields}


def _field_info(annotation: type, field: dataclasses.Field[Any]) -> FieldInfo:
    default: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = Field(default_factory=field.default_factory)
    elif default is dataclasses.MISSING:
        return FieldInfo.from_annotation(annotation)
    return FieldInfo.from_annotated_attribute(annotation, default)
