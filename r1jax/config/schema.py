"""What belongs at a key of a config, from the JSON schema that pydantic makes of the settings."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

from pydantic import BaseModel

from r1jax.config.run_config import RunConfig
from r1jax.config.yaml_file import KeyPath
from r1jax.settings.kinds import KINDS, load_kind
from r1jax.settings.section import JsonObject
from r1jax.settings.stage import Stage

JsonSchema: TypeAlias = dict[str, Any]
"""{} says nothing about a value."""


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


def schema_at(data: JsonObject, path: KeyPath) -> JsonSchema:
    """The schema of what stands, or could stand, at `path`."""
    return _walk(data, path)[0]


def keys_at(data: JsonObject, path: KeyPath) -> dict[str, JsonSchema]:
    """The keys that the section at `path` may have, with their schemas."""
    keys: dict[str, JsonSchema] = _alternative(*_walk(data, path)).get("properties", {})
    return keys


def default_at(data: JsonObject, path: KeyPath) -> JsonObject:
    """What a section that the config leaves out would have."""
    default = schema_at(data, path).get("default")
    return copy.deepcopy(default) if isinstance(default, dict) else {}


def _walk(data: JsonObject, path: KeyPath) -> tuple[JsonSchema, Any]:
    """The schema of the value at `path`, and the value; None where there is none."""
    kinds = dict.fromkeys(str(stage["kind"]) for _, stage, _ in stage_kinds(data))
    schema, value = _schema(tuple(kinds)), cast(Any, data)
    for key in path:
        schema = _alternative(schema, value)
        if isinstance(key, int):
            schema = schema.get("items", {})
        else:
            schema = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            schema = schema if isinstance(schema, dict) else {}
        value = value[key] if has(value, key) else None
    return schema, value


def named_values(schema: JsonSchema) -> list[str]:
    """The values that `schema` allows by name, in any of its alternatives."""
    nested = [value for option in schema.get("anyOf", ()) for value in named_values(option)]
    constant = [schema["const"]] if "const" in schema else []
    return [*map(str, [*schema.get("enum", ()), *constant]), *nested]


_TYPES = {
    "string": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
_BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "above"),
    ("maximum", "at most"),
    ("exclusiveMaximum", "below"),
)


def describe(schema: JsonSchema) -> str:
    """What belongs at a key, in words."""
    if "enum" in schema or "const" in schema:
        return " or ".join(named_values(schema))
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"])
    if "oneOf" in schema:
        return "a section with " + schema["discriminator"]["propertyName"]
    kind = schema.get("type")
    if kind == "array":
        return f"a list (each {describe(schema['items'])})" if schema.get("items") else "a list"
    if kind == "object":
        keys = schema.get("properties")
        return f"a section with {', '.join(keys)}" if keys else "a mapping"
    limits = [f"{words} {schema[key]:g}" for key, words in _BOUNDS if key in schema]
    return " ".join([_TYPES.get(str(kind), "a value"), " and ".join(limits)]).rstrip()


def _alternative(schema: JsonSchema, value: object) -> JsonSchema:
    """The alternative of a union that `value` is meant to be; {} where that cannot be told."""
    if "anyOf" in schema:
        wanted = "object" if isinstance(value, dict) else "array"
        options = schema["anyOf"]
        # A union of sections by kind (`oneOf`) has no type.
        meant = [option for option in options if option.get("type", "object") == wanted]
        return _alternative(meant[0], value) if meant else {}
    if "oneOf" in schema:
        tag = schema["discriminator"]["propertyName"]
        kinds = {option["properties"][tag]["const"]: option for option in schema["oneOf"]}
        kind = str(value.get(tag)) if isinstance(value, dict) else None
        return kinds.get(kind) or {"properties": {tag: {"enum": list(kinds)}}}
    return schema


@functools.cache
def _schema(kinds: tuple[str, ...]) -> JsonSchema:
    """The schema of a config with stages of these kinds, without references."""
    from pydantic.json_schema import models_json_schema  # slow, and needed for few configs

    models: dict[str, type[BaseModel]] = {
        "": RunConfig,
        **{kind: load_kind(kind) for kind in kinds},
    }
    references, schema = models_json_schema([(model, "validation") for model in models.values()])
    config, *stages = (
        _inlined(references[model, "validation"], schema["$defs"]) for model in models.values()
    )
    known = {kind: {"properties": {}} for kind in KINDS} | dict(zip(kinds, stages, strict=True))
    for kind, stage in known.items():
        stage["properties"] = {**stage["properties"], "kind": {"const": kind}}
    config["properties"]["stages"]["items"] = {
        "oneOf": list(known.values()),
        "discriminator": {"propertyName": "kind"},
    }
    return config


def _inlined(schema: Any, definitions: JsonSchema) -> Any:
    """`schema` with what its references stand for; what is beside them (`default`) stays."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    target = definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else {}
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    return {key: _inlined(value, definitions) for key, value in {**target, **beside}.items()}
