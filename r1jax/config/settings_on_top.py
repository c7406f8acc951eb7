"""A config file as plain data, and the settings that are put on top of it.

A file may begin where another one ends (`base`), and say what changes on some slices (`slices`).
Both are settings as on the command line: a key is a path, and its value takes the place of what was
there:

    base: r1_zero/qwen2.5-32b          # a file or a packaged config
    model.path: Qwen/Qwen2.5-14B
    slices:
      v5p:4x4x4: {mesh.axes: {fsdp: 8, tensor: 8}, stages.rl.micro_batches: 64}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from r1jax.config.error_messages import MOST_MISTAKES
from r1jax.config.expected import default_at
from r1jax.config.packaged import find_config, read_mesh
from r1jax.config.slices import slice_name
from r1jax.config.yaml_file import ConfigError, KeyPath, read_yaml, show
from r1jax.files import JsonObject

_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Setting:
    """A value for a dotted key, with the place where it was given and how (`text`)."""

    key: str
    value: JsonValue
    place: str
    text: str


@dataclass
class _Document:
    """Plain data, where (`file:line` or the command line) each part of it is from, and what is
    wrong with it so far. `on_top` has the settings that gave values, by key path."""

    source: str
    data: JsonObject
    places: dict[KeyPath, str]
    slices: dict[str, list[_Setting]] = field(default_factory=dict)
    on_top: dict[KeyPath, _Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_problem(self, path: KeyPath, message: str) -> None:
        """Notes a message after the place to correct: the command line or a line of the file."""
        parents = (path[:end] for end in range(len(path), -1, -1))
        place = next(self.places[each] for each in parents if each in self.places)
        # A rule between keys may be broken by a setting of one of them. At the root that says
        # nothing about which.
        below = [each for at, each in self.on_top.items() if at[: len(path)] == path != at]
        named = [(e.text, e.place.replace(_COMMAND_LINE, "the command line")) for e in below]
        hints = [f"with {text} from {place}" for text, place in named if path]
        self.problems.append(f"{place}: {message}" + (f" ({', '.join(hints)})" if hints else ""))

    def put(self, setting: _Setting) -> None:
        """Puts a value at its key, or notes why it cannot be there."""
        try:
            path = self._set(setting)
        except (ValueError, LookupError) as error:
            self.problems.append(f"{setting.place}, {setting.text}: {error.args[0]}")
            return
        # Earlier settings of the same place, or of a part of it, no longer count.
        for table in (self.places, self.on_top):
            for at in [at for at in table if at[: len(path)] == path]:
                del table[at]
        self.places[path], self.on_top[path] = setting.place, setting

    def _set(self, setting: _Setting) -> KeyPath:
        """Puts the value where its key leads, making sections on the way; returns the path."""
        parts = setting.key.split(".")
        if "" in parts:
            raise ValueError("should be key.path=value")
        node: Any = self.data
        path: KeyPath = ()
        while True:
            key, taken = _step(node, parts, path)
            path, parts = (*path, key), parts[taken:]
            if not parts:
                node[key] = _mesh(path, setting.value)
                return path
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = default_at(self.data, path)
                self.places[path] = setting.place
            node = node[key]


def _mesh(path: KeyPath, value: JsonValue) -> JsonValue:
    """The mesh of a name, before another setting steps into it."""
    return read_mesh(value) if path == ("mesh",) and isinstance(value, str) else value


def _step(node: JsonValue, parts: Sequence[str], path: KeyPath) -> tuple[str | int, int]:
    """The key of `node` that `parts` begin with, and how many parts it is made of."""
    where = ".".join(map(str, path))
    if isinstance(node, dict):
        # A key may itself have dots: rewards.package.module:function.weight=2.
        for taken in range(len(parts), 0, -1):
            if ".".join(parts[:taken]) in node:
                return ".".join(parts[:taken]), taken
        return parts[0], 1
    if not isinstance(node, list):
        raise LookupError(f"{where} = {show(node)} has no keys below it")
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
    if parts[0] in names:
        return names.index(parts[0]), 1
    if parts[0].isdecimal() and int(parts[0]) < len(node):
        return int(parts[0]), 1
    known = [name for name in names if isinstance(name, str)]
    near = difflib.get_close_matches(parts[0], known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known)}" if known else ""
    raise LookupError(f"{where} has {len(node)} entries and none is {parts[0]!r}{hint}")


def read_document(text: str, source: str, above: tuple[str, ...] = ()) -> _Document:
    """The data of a file, or that of its base with the file's settings on top.

    source: what messages call the file. above: the files that are based on this one. Raises
    ConfigError if it has no data with which to go on.
    """
    file = read_yaml(text)
    places = {path: f"{source}:{line}" for path, line in file.lines.items()}
    problems = [f"{source}:{line}: {problem}" for line, problem in file.problems]
    data = file.data
    if not isinstance(data, dict):
        missing = f"{source}: should be a mapping of keys, not {show(data)}"
        raise ConfigError(problems or [missing])
    slices: dict[str, list[_Setting]] = {}
    table = data.pop("slices", None) or {}
    if isinstance(table, dict):
        for name, settings in table.items():
            if isinstance(settings, dict):
                slices[name] = _settings(settings, ("slices", name), places)
            elif len(problems) < MOST_MISTAKES:
                at = places.get(("slices", name), places["slices",])
                expected = f"should be a mapping of settings, not {show(settings)}"
                problems.append(f"{at}: slices.{name}: {expected}")
    else:
        expected = "should be a mapping of slices to their settings"
        problems.append(f"{places['slices',]}: slices: {expected}, not {show(table)}")
    if "base" in data:
        base = data.pop("base")
        document = _read_base(str(base), places["base",], (*above, source))
        document.slices = slices or document.slices
        document.problems += problems
        for setting in _settings(data, (), places):
            document.put(setting)
        return document
    document = _Document(source, data, places, slices, problems=problems)
    try:
        if "mesh" in data:
            data["mesh"] = _mesh(("mesh",), data["mesh"])
    except ValueError as error:
        document.add_problem(("mesh",), str(error))
        data["mesh"] = {}
    return document


def _read_base(base: str, place: str, above: tuple[str, ...]) -> _Document:
    try:
        path = find_config(base)
    except ConfigError as error:
        raise ConfigError([f"{place}: base: {error}"]) from None
    if str(path) in above:
        raise ConfigError([f"{place}: base = {base} is based on this file itself"])
    return read_document(read_text(path), str(path), above)


def _settings(table: JsonObject, at: KeyPath, places: Mapping[KeyPath, str]) -> list[_Setting]:
    """The settings that a file has at the key path `at`."""
    return [
        # Keys that a merge (`<<`) brought have no line.
        _Setting(key, value, places.get((*at, key), places[at]), f"{key}={show(value)}")
        for key, value in table.items()
    ]


def read_text(path: Path) -> str:
    """The text of a file; raises ConfigError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: not a text file in UTF-8"]) from None


def put_slice(document: _Document, name: str) -> None:
    """Puts the settings of a slice on top."""
    same = [each for each in document.slices if slice_name(each) == slice_name(name)]
    name = name if name in document.slices else same[0] if same else name
    if name not in document.slices:
        known = ", ".join(document.slices)
        hint = f"it has settings for {known}" if known else "it has no slices"
        document.problems.append(f"{document.source}: no settings for the slice {name}; {hint}")
    for setting in document.slices.get(name, ()):
        document.put(setting)


def put_overrides(document: _Document, overrides: Sequence[str]) -> None:
    """Puts settings of the command line on top: `key.path=value`, where the value is YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        file = read_yaml(value)
        if file.problems or not equals:
            problem = file.problems[0][1] if file.problems else "should be key.path=value"
            document.problems.append(f"{_COMMAND_LINE}, {text}: {problem}")
        else:
            document.put(_Setting(key, file.data, _COMMAND_LINE, text))
