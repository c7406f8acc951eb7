"""YAML text to plain data with the line of each key, and back.

Scalars are those of YAML 1.2's core schema, not of PyYAML's 1.1: `1e-4` is a number, `no` and
`12:30` are strings, `010` is ten. A key given twice is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import yaml

if TYPE_CHECKING:
    from pydantic import JsonValue

    from r1jax.files import JsonObject

_MOST_VALUES = 100_000  # of a file

KeyPath: TypeAlias = tuple[str | int, ...]


class ConfigError(ValueError):
    """A config that cannot be run as it stands. `problems` has one line for each mistake."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass
class _YamlFile:
    """Plain data, the line of each key path, and (line, problem) of what is wrong.

    The data is usable where only keys are wrong, and else None.
    """

    data: JsonValue = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def read_yaml(text: str) -> _YamlFile:
    """Mappings with text keys, lists and scalars, of which no two places share one."""
    file = _YamlFile()
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is not None:
            _note_lines(root, (), (), file)
            # Through JSON and back: what an alias shares must not be shared when one place of it is
            # overridden, and what JSON cannot say (!!binary) has no place in a config.
            file.data = json.loads(json.dumps(loader.construct_document(root)))
    except (AttributeError, LookupError, OverflowError) as error:  # of PyYAML's constructors
        line = loader.wrong_line or 1
        file.problems.append((line, f"not valid YAML: a value does not fit its tag ({error})"))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        parts = [getattr(error, name, None) for name in ("context", "problem")]
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = " ".join(filter(None, parts)) or str(error)
        if not file.problems:  # such as a key that is no text: the cause
            line = mark.line + 1 if mark else _line_of(error, text) or loader.wrong_line or 1
            file.problems.append((line, f"not valid YAML: {problem}"))
    finally:
        loader.dispose()
    return file


def write_yaml(data: JsonObject) -> str:
    """YAML that `read_yaml` reads back as the same data; texts of several lines as blocks."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def show(value: JsonValue) -> str:
    """`value` as YAML on one line, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _note_lines(
    node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...], file: _YamlFile
) -> None:
    """Notes the line of every key from `node` on, and the keys that are wrong."""
    name, line = ".".join(map(str, path)), node.start_mark.line + 1
    if len(file.lines) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES:,} values, as aliases of aliases make them")
    if node in above:
        file.problems.append((line, f"{name} contains itself"))
        return
    above = (*above, node)
    # A key's own line, set by the mapping around it, says more than where its value starts.
    file.lines.setdefault(path, line)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _note_lines(child, (*path, index), above, file)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, child in node.value:
            line, at = key.start_mark.line + 1, (*path, str(key.value))
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                problem = f"the key {key.value} is not text: put it in quotes"
                file.problems.append((line, problem))
            elif key.value in seen:
                problem = f"is given twice, first in line {seen[key.value]}"
                file.problems.append((line, f"{'.'.join(map(str, at))} {problem}"))
            seen[str(key.value)] = file.lines[at] = line
            _note_lines(child, at, above, file)


def _line_of(error: Exception, text: str) -> int | None:
    """Of a character that YAML does not allow; None: the error is another one."""
    if not isinstance(error, yaml.reader.ReaderError):
        return None
    return next(
        (
            number
            for number, line in enumerate(text.split("\n"), start=1)
            if yaml.reader.Reader.NON_PRINTABLE.search(line)
        ),
        None,
    )


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    wrong_line: int | None = None
    """Of the value that could not be made, the innermost one."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except Exception:
            self.wrong_line = self.wrong_line or node.start_mark.line + 1
            raise


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # Underscores are not YAML 1.2, but 10_000 means only one thing to anyone who writes Python.
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _tag, _regexp = f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$")
        _class.add_implicit_resolver(_tag, _regexp, _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Dumper.add_representer(str, _represent_str)
