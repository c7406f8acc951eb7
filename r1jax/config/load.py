"""Reads a YAML file and `key.path=value` overrides into a `RunConfig`, or says what is wrong.

YAML is read by the rules of YAML 1.2's core schema, not PyYAML's 1.1: `1e-4` is a number, `no` and
`12:30` are strings, `010` is ten. A key given twice is an error. All mistakes of a file and its
command line are reported at once, each with its place, its value and what belongs there.

A file may begin where another one ends (`base`), and say what changes on some slices (`slices`).
Both are settings as on the command line: a key is a path, and its value takes the place of what was
there:

    base: r1_zero/qwen2.5-32b          # a file or a packaged config
    model.path: Qwen/Qwen2.5-14B
    slices:
      v5p:4x4x4: {mesh.axes: {fsdp: 8, tensor: 8}, stages.rl.micro_batches: 64}

Relative paths in a config (`jsonl:PATH`, `model.path`, `model.tokenizer`, `output`) are relative to
the working directory, not to the config's folder: a packaged config must work from anywhere.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema

from r1jax.bucket import locate
from r1jax.config.benchmarks import fill_in
from r1jax.config.packaged import packaged_configs, read_mesh
from r1jax.config.run_config import RunConfig

KeyPath = tuple[str | int, ...]
JsonSchema = dict[str, Any]
ErrorDetails = Mapping[str, Any]
"""Pydantic's: `type`, `loc`, `msg`, `input`."""


class ConfigError(ValueError):
    """A config that cannot be run as it stands. `problems` has one line for each mistake."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


# --- Finding -------------------------------------------------------------------------------------


def find_config(name_or_path: str | Path) -> Path:
    """The file meant by `name_or_path`: an existing file, or else the name of a packaged config.

    The file may be on a bucket (`gs://...`).

    Raises:
      ConfigError: there is neither; the message names the nearest packaged configs.
    """
    path = locate(name_or_path)
    if path.is_file():
        return path
    known = packaged_configs()
    name = path.with_suffix("").as_posix() if path.suffix == ".yaml" else path.as_posix()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # A bare `r1_zero` is no close match of `tiny/r1_zero`, yet what was meant is plain.
    near += [key for key in known if name in key.split("/") and key not in near]
    choice = f"did you mean {_either(near)}?" if near else f"packaged: {', '.join(known) or 'none'}"
    raise ConfigError([f"{name_or_path}: neither a file nor a packaged config; {choice}"])


# --- Loading -------------------------------------------------------------------------------------


def load_config(
    name_or_path: str | Path, overrides: Sequence[str] = (), slice_name: str | None = None
) -> RunConfig:
    """Reads, overrides and checks one config. Touches no device.

    Args:
      name_or_path: as for `find_config`.
      overrides: `key.path=value` each, the later winning. The value is YAML. A path steps into a
        list by index or by the `name` of the entry: `stages.rl.optimizer.learning_rate=1e-6`.
        A section that the file leaves out keeps its other defaults.
      slice_name: an entry of the config's `slices`, whose settings come before the overrides.

    Raises:
      ConfigError: with every problem of the file and of the overrides.
    """
    path = find_config(name_or_path)
    return parse_config(_text(path), str(path), overrides, slice_name)


def parse_config(
    text: str, source: str, overrides: Sequence[str] = (), slice_name: str | None = None
) -> RunConfig:
    """As `load_config`, from YAML text; `source` is what error messages call it."""
    document, faults = _read(text, source)
    if slice_name is not None:
        faults += _apply_slice(document, slice_name)
    faults += _apply_overrides(document, overrides)
    unnamed = [(at, f"{document.name(at)} = {what}") for at, what in fill_in(document.data)]
    problems = [*unnamed, *_unknown_keys(document)]
    config = None
    if not unnamed:  # without what they define, the schema would miss much that was not forgotten
        try:
            # JSON mode is strict about types, so that "5", true or 5.0 is no integer, without
            # asking YAML for tuples and dataclasses.
            config = RunConfig.model_validate_json(json.dumps(document.data), strict=True)
        except ValidationError as error:
            problems += _schema_problems(document, error.errors(include_url=False))
    faults += [document.locate(path, message) for path, message in problems]
    if faults or config is None:
        raise ConfigError(faults)
    return config


def slices_of(name_or_path: str | Path) -> list[str]:
    """The slices that a config has settings for, in its order."""
    path = find_config(name_or_path)
    return list(_read(_text(path), str(path))[0].slices)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: not a text file in UTF-8"]) from None


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; `parse_config` reads it back to an equal one."""
    return yaml.dump(
        config.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )


_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Setting:
    """A value that takes the place of another; `text` and `place` are for messages about it."""

    value: Any
    text: str
    place: str


@dataclass
class _Document:
    """Plain data, and where each part of it came from."""

    source: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    slices: dict[str, dict[str, _Setting]] = field(default_factory=dict)
    overridden: dict[KeyPath, _Setting] = field(default_factory=dict)

    def set(self, key: str, setting: _Setting) -> None:
        """Puts a value at a dotted key; raises ValueError or LookupError where it cannot be."""
        if not key or "" in key.split("."):
            raise ValueError("should be key.path=value")
        path = _set(self.data, key.split("."), setting.value)
        for _, problem in _name_mesh(self):
            raise ValueError(problem)
        # An earlier setting of the same place, or of a part of it, no longer counts.
        for at in [at for at in self.overridden if at[: len(path)] == path]:
            del self.overridden[at]
        self.overridden[path] = setting

    def value(self, path: KeyPath) -> Any:
        """What stands at `path`; raises LookupError or TypeError where nothing does."""
        node: Any = self.data
        for key in path:
            node = node[key]
        return node

    def name(self, path: KeyPath) -> str:
        """`path` as a user would write it on the command line: stages by name."""
        parts = []
        for depth, key in enumerate(path):
            entry = self.value(path[: depth + 1]) if isinstance(key, int) else None
            name = entry.get("name") if isinstance(entry, dict) else None
            parts.append(name if isinstance(name, str) else str(key))
        return ".".join(parts)

    def locate(self, path: KeyPath, message: str) -> str:
        """`message` after the place to correct: the command line or a line of the file."""
        within = [each for at, each in self.overridden.items() if path[: len(at)] == at]
        below = [each for at, each in self.overridden.items() if at[: len(path)] == path]
        if within:
            return f"{within[-1].place}: {message}"
        if below and path not in self.lines:
            return f"{below[-1].place}, {below[-1].text}: {message}"
        line = next((self.lines[p] for p in _prefixes(path) if p in self.lines), 1)
        # A rule between keys may be broken by an override of one of them. At the root that says
        # nothing about which.
        places = dict.fromkeys(each.place for each in below)
        hints = [
            f"with {', '.join(each.text for each in below if each.place == place)} from "
            + place.replace(_COMMAND_LINE, f"the {_COMMAND_LINE}")
            for place in places
        ]
        hint = f" ({', '.join(hints)})" if hints and path else ""
        return f"{self.source}:{line}: {message}{hint}"


def _prefixes(path: KeyPath) -> Iterator[KeyPath]:
    """`path` and its parents, longest first."""
    return (path[:end] for end in range(len(path), -1, -1))


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)


# --- YAML ----------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would read as something else; long texts as blocks."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # Underscores are not YAML 1.2, but 10_000 means only one thing to anyone who writes Python.
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(str, _represent_str)


def _plain(text: str) -> tuple[Any, dict[KeyPath, int], list[tuple[int, str]]]:
    """Reads YAML into plain data: mappings with text keys, lists and scalars.

    Returns:
      The data, the line of every key path, and (line, problem) pairs. Keys given twice leave the
      data usable, so that what else is wrong is found too; anything worse raises _Unreadable.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, {}, []
        lines: dict[KeyPath, int] = {}
        problems: list[tuple[int, str]] = []
        _inspect(root, (), (), lines, problems)
        # Through JSON and back: what an alias shares must not be shared when one place of it is
        # overridden, and what JSON cannot say (!!binary) has no place in a config.
        data = json.loads(json.dumps(loader.construct_document(root)))
        return data, lines, problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise _Unreadable(mark.line + 1 if mark else 1, f"not valid YAML: {problem}") from None
    except (yaml.YAMLError, TypeError) as error:
        raise _Unreadable(1, f"not valid YAML: {error}") from None
    finally:
        loader.dispose()


class _Unreadable(Exception):
    """Text from which no plain data can be made."""

    def __init__(self, line: int, problem: str):
        super().__init__(line, problem)
        self.line, self.problem = line, problem


def _inspect(
    node: yaml.Node,
    path: KeyPath,
    above: tuple[yaml.Node, ...],
    lines: dict[KeyPath, int],
    problems: list[tuple[int, str]],
) -> None:
    """Notes the line of every key from `node` on, and the keys that are wrong in themselves."""
    if node in above:
        raise _Unreadable(node.start_mark.line + 1, f"{_dotted(path)} contains itself")
    above = (*above, node)
    # A key's own line, set by the mapping around it, says more than where its value starts.
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _inspect(child, (*path, index), above, lines, problems)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise _Unreadable(line, f"the key {key.value} is not text: put it in quotes")
            at = (*path, key.value)
            if key.value in seen:
                first = seen[key.value]
                problems.append((line, f"{_dotted(at)} is given twice, first in line {first}"))
            seen[key.value] = lines[at] = line
            _inspect(child, at, above, lines, problems)


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


# --- Settings: of a file on its base, of a slice, of the command line ----------------------------


def _read(text: str, source: str, above: tuple[str, ...] = ()) -> tuple[_Document, list[str]]:
    """A file's data, or that of its base with its own settings; and what is wrong with them.

    Args:
      above: the files that are based on this one.
    """
    try:
        data, lines, repeated = _plain(text)
    except _Unreadable as error:
        raise ConfigError([f"{source}:{error.line}: {error.problem}"]) from None
    if not isinstance(data, dict):
        raise ConfigError([f"{source}: should be a mapping of keys, not {_show(data)}"])
    faults = [f"{source}:{line}: {problem}" for line, problem in repeated]
    slices, more = _slices(data.pop("slices", None), source, lines)
    faults += more
    if "base" not in data:
        document = _Document(source, data, lines, slices)
        return document, faults + [document.locate(*problem) for problem in _name_mesh(document)]
    base, place = data.pop("base"), f"{source}:{lines[('base',)]}"
    try:
        path = find_config(str(base))
    except ConfigError as error:
        raise ConfigError([f"{place}: base: {error}"]) from None
    if str(path) in (*above, source):
        raise ConfigError([f"{place}: base = {base} is based on this file itself"])
    document, more = _read(_text(path), str(path), (*above, source))
    document.slices = slices or document.slices
    faults += more
    for key, value in data.items():
        place = f"{source}:{lines[(key,)]}"
        faults += _put(document, key, _Setting(value, f"{key}={_show(value)}", place))
    return document, faults


def _slices(
    table: Any, source: str, lines: Mapping[KeyPath, int]
) -> tuple[dict[str, dict[str, _Setting]], list[str]]:
    """Slice -> key -> setting."""
    if table is None:
        return {}, []
    if not isinstance(table, dict) or not all(isinstance(each, dict) for each in table.values()):
        line = lines[("slices",)]
        return {}, [f"{source}:{line}: slices: should be a mapping of slices to their settings"]
    found = {
        name: {
            # Keys that a merge (`<<`) brought have no line of their own.
            key: _Setting(
                value,
                f"{key}={_show(value)}",
                f"{source}:{lines.get(('slices', name, key), lines[('slices', name)])}",
            )
            for key, value in settings.items()
        }
        for name, settings in table.items()
    }
    return found, []


def _apply_slice(document: _Document, name: str) -> list[str]:
    if name not in document.slices:
        known = ", ".join(document.slices)
        told = f"it has settings for {known}" if known else "it has no slices"
        return [f"{document.source}: no settings for the slice {name}; {told}"]
    return [
        problem
        for key, setting in document.slices[name].items()
        for problem in _put(document, key, setting)
    ]


def _apply_overrides(document: _Document, overrides: Sequence[str]) -> list[str]:
    problems = []
    for text in overrides:
        name, equals, value_text = text.partition("=")
        try:
            if not equals:
                raise ValueError("should be key.path=value")
            value, _, repeated = _plain(value_text)
            if repeated:
                raise ValueError(repeated[0][1])
        except _Unreadable as error:
            problems.append(f"{_COMMAND_LINE}, {text}: {error.problem}")
        except ValueError as error:
            problems.append(f"{_COMMAND_LINE}, {text}: {error.args[0]}")
        else:
            problems += _put(document, name, _Setting(value, text, _COMMAND_LINE))
    return problems


def _put(document: _Document, key: str, setting: _Setting) -> list[str]:
    """What is wrong with a setting, which is in force otherwise."""
    try:
        document.set(key, setting)
    except (ValueError, LookupError) as error:
        return [f"{setting.place}, {setting.text}: {error.args[0]}"]
    return []


def _name_mesh(document: _Document) -> list[tuple[KeyPath, str]]:
    """Puts the mesh in the place of its name, before an override steps into it."""
    name = document.data.get("mesh")
    if not isinstance(name, str):
        return []
    document.data["mesh"] = {}
    try:
        document.data["mesh"] = read_mesh(name)
    except ValueError as error:
        return [(("mesh",), f"mesh = {error}")]
    return []


def _set(data: dict[str, Any], parts: list[str], value: Any) -> KeyPath:
    """Puts `value` at `parts` in `data`, making sections on the way; returns the path taken."""
    node: Any = data
    path: KeyPath = ()
    while True:
        key, taken = _step(node, parts, path)
        parts = parts[taken:]
        path = (*path, key)
        if not parts:
            node[key] = value
            return path
        if isinstance(node, dict) and node.get(key) is None:
            default = _schema_at(data, path).get("default")
            node[key] = json.loads(json.dumps(default)) if isinstance(default, dict) else {}
        node = node[key]


def _step(node: Any, parts: list[str], path: KeyPath) -> tuple[str | int, int]:
    """The key of `node` that `parts` begin with, and how many parts it is made of."""
    where = _dotted(path)
    if isinstance(node, dict):
        # A key may itself have dots: rewards.package.module:function.weight=2.
        for taken in range(len(parts), 0, -1):
            if ".".join(parts[:taken]) in node:
                return ".".join(parts[:taken]), taken
        return parts[0], 1
    if not isinstance(node, list):
        raise LookupError(f"{where} = {_show(node)} has no keys below it")
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
    if parts[0] in names:
        return names.index(parts[0]), 1
    if re.fullmatch(r"[0-9]+", parts[0]) and int(parts[0]) < len(node):
        return int(parts[0]), 1
    known = [name for name in names if isinstance(name, str)]
    near = difflib.get_close_matches(parts[0], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}" if known else ""
    raise LookupError(
        f"{where} has {len(node)} entries and none is {parts[0]!r}" + (f"; {hint}" if hint else "")
    )


# --- Comparing with the schema -------------------------------------------------------------------


class _WithDefaults(GenerateJsonSchema):
    """Pydantic's JSON schema with the defaults that a factory makes."""

    def get_default_value(self, schema: Any) -> Any:
        factory = schema.get("default_factory")
        if factory is None or schema.get("default_factory_takes_data"):
            return super().get_default_value(schema)
        return factory()


@functools.cache
def _schema() -> JsonSchema:
    return RunConfig.model_json_schema(schema_generator=_WithDefaults)


def _deref(schema: JsonSchema) -> JsonSchema:
    """Follows a `$ref`; what stands beside it (`default`, `description`) stays."""
    while "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        beside = {key: value for key, value in schema.items() if key != "$ref"}
        schema = {**_schema()["$defs"][name], **beside}
    return schema


def _branch(schema: JsonSchema, value: Any) -> JsonSchema:
    """The alternative of a union that `value` is meant to be; {} where that cannot be told."""
    schema = _deref(schema)
    if "discriminator" in schema:
        mapping = schema["discriminator"]["mapping"]
        tag = value.get(schema["discriminator"]["propertyName"]) if isinstance(value, dict) else 0
        return _deref({"$ref": mapping[tag]}) if isinstance(tag, str) and tag in mapping else {}
    if "anyOf" in schema:
        wanted = "object" if isinstance(value, dict) else "array"
        alternatives = [_deref(option) for option in schema["anyOf"]]
        tagged = [option for option in alternatives if "discriminator" in option]
        if tagged and wanted == "object":
            return _branch(tagged[0], value)
        return next((option for option in alternatives if option.get("type") == wanted), {})
    return schema


def _child(schema: JsonSchema, key: str | int) -> JsonSchema:
    """The schema of entry `key`; {} where the schema says nothing about it."""
    if isinstance(key, int):
        return _deref(schema.get("items", {}))
    others = schema.get("additionalProperties")
    return _deref(schema.get("properties", {}).get(key, others if isinstance(others, dict) else {}))


def _schema_at(data: Any, path: KeyPath) -> JsonSchema:
    """The schema of what stands, or could stand, at `path`."""
    schema = _schema()
    for key in path:
        schema = _child(_branch(schema, data), key)
        present = isinstance(data, list) or (isinstance(data, dict) and key in data)
        data = data[key] if present else None
    return schema


def _unknown_keys(document: _Document) -> list[tuple[KeyPath, str]]:
    """Found here and not by pydantic, which forbids no extra keys in a plain dataclass."""
    problems: list[tuple[KeyPath, str]] = []

    def visit(schema: JsonSchema, value: Any, path: KeyPath) -> None:
        schema = _branch(schema, value)
        entries: list[tuple[str | int, Any]] = []
        if isinstance(value, dict):
            entries = list(value.items())
        elif isinstance(value, list):
            entries = list(enumerate(value))
        for key, entry in entries:
            at = (*path, key)
            if "properties" in schema and key not in schema["properties"]:
                given = f"{document.name(at)} = {_show(entry)}: unknown key"
                problems.append((at, f"{given}; {_nearest(str(key), schema)}"))
            else:
                visit(_child(schema, key), entry, at)

    visit(_schema(), document.data, ())
    return problems


def _nearest(key: str, schema: JsonSchema) -> str:
    """What the writer of `key` may have meant in the section `schema`."""
    options = schema["properties"]
    below = {
        f"{name}.{inner}": inner_schema
        for name, option in options.items()
        for inner, inner_schema in _deref(option).get("properties", {}).items()
    }
    near = difflib.get_close_matches(key, options, n=1)
    # A right name at the wrong depth: learning_rate instead of optimizer.learning_rate.
    near += [name for name in below if name.split(".")[1] == key]
    if not near:
        return f"known here: {', '.join(options)}"
    expected = _describe({**below, **options}[near[0]])
    return f"did you mean {near[0]} ({expected})?"


def _schema_problems(
    document: _Document, errors: Sequence[ErrorDetails]
) -> list[tuple[KeyPath, str]]:
    """Pydantic's errors as (key path, message), one for each value that is wrong."""
    found: dict[KeyPath, ErrorDetails] = {}
    for error in errors:
        found.setdefault(_key_path(document.data, error), error)
    # Of a union, the alternatives that were not meant complain as well, higher up.
    paths = list(found)
    meant = [
        path
        for path in paths
        if not any(other != path and other[: len(path)] == path for other in paths)
        or not found[path]["type"].endswith(("_type", "literal_error"))
    ]
    unknown = ("extra_forbidden", "unexpected_keyword_argument")  # told already
    return [
        (path, _message(document, path, found[path]))
        for path in meant
        if found[path]["type"] not in unknown
    ]


def _key_path(data: Any, error: ErrorDetails) -> KeyPath:
    """An error's place without the names of union alternatives that pydantic puts in it."""
    path: KeyPath = ()
    location = error["loc"]
    for index, key in enumerate(location):
        missing = error["type"] == "missing" and index == len(location) - 1
        if isinstance(data, list) and isinstance(key, int):
            data = data[key]
        elif isinstance(data, dict) and key in data:
            data = data[key]
        elif not missing:
            continue
        path = (*path, key)
    return path


def _message(document: _Document, path: KeyPath, error: ErrorDetails) -> str:
    name, kind = document.name(path) if error["type"] != "missing" else "", error["type"]
    if kind == "missing":
        parent = document.name(path[:-1])
        name = f"{parent}.{path[-1]}" if parent else str(path[-1])
        return f"{name} is missing: should be {_describe(_schema_at(document.data, path))}"
    if kind == "value_error":
        # The schema's own rules name their keys from the section on.
        reason = error["msg"].removeprefix("Value error, ")
        return f"{name}: {reason}" if name and not reason.startswith(name) else reason
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        schema = _schema_at(document.data, path)["discriminator"]
        tag, tags = schema["propertyName"], list(schema["mapping"])
        value = document.value(path)
        if tag not in value:
            return f"{name}.{tag} is missing: should be {_either(tags)}"
        return f"{name}.{tag} = {_show(value[tag])}: should be {_either(tags)}" + _meant(
            value[tag], tags
        )
    given = f"{name} = {_show(error['input'])}"
    if kind.endswith("_type") or kind in ("int_from_float", "literal_error"):
        schema = _schema_at(document.data, path)
        options = [str(option) for option in _enumerated(schema)]
        return f"{given}: should be {_describe(schema)}" + _meant(error["input"], options)
    # Bounds and patterns: pydantic's words say it ("Input should be greater than 0").
    return f"{given}: {error['msg'].removeprefix('Input ').removeprefix('String ')}"


def _meant(value: Any, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), options, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _enumerated(schema: JsonSchema) -> list[Any]:
    """The values that `schema` allows by name, in any of its alternatives."""
    schema = _deref(schema)
    nested = [value for option in schema.get("anyOf", ()) for value in _enumerated(option)]
    constant = [schema["const"]] if "const" in schema else []
    return [*schema.get("enum", ()), *constant, *nested]


_TYPES = {
    "string": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


def _describe(schema: JsonSchema) -> str:
    """What belongs at a key, in words."""
    schema = _deref(schema)
    if "enum" in schema:
        return _either([str(value) for value in schema["enum"]])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        return _either([_describe(option) for option in schema["anyOf"]])
    if "oneOf" in schema:
        return "a section with " + schema["discriminator"]["propertyName"]
    kind = schema.get("type")
    if kind == "array":
        return f"a list (each {_describe(schema['items'])})" if schema.get("items") else "a list"
    if kind == "object":
        keys = schema.get("properties")
        return f"a section with {', '.join(keys)}" if keys else "a mapping"
    described = _TYPES.get(str(kind), "a value")
    bounds = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    limits = [f"{words} {schema[key]:g}" for key, words in bounds if key in schema]
    return " ".join([described, " and ".join(limits)]) if limits else described


def _show(value: Any) -> str:
    """`value` as YAML on one line, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False) if value is not None else "null"
    return text if len(text) <= 60 else text[:57] + "..."


__all__ = [
    "ConfigError",
    "dump_config",
    "find_config",
    "load_config",
    "parse_config",
    "slices_of",
]
