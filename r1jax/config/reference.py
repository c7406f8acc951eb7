"""Every key of a config with its type, default and meaning, read off the classes of the settings.

`r1jax explain` and the documentation site print what is here.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args, get_origin

from pydantic import JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from r1jax.config.expected import alternatives, describe, keys_of
from r1jax.config.other_names import OTHER_NAMES, no_counterpart
from r1jax.config.run_config import RunConfig
from r1jax.config.yaml_file import ConfigError, show
from r1jax.rewards import REWARDS
from r1jax.settings.data import FIELDS
from r1jax.settings.kinds import KINDS, load_kind
from r1jax.settings.stage import Stage


@dataclass(frozen=True)
class Setting:
    """One key of a config.

    key: dotted; NAME stands for a name of the config's, N for an index of a list. kinds: of stages
    or, in `rewrite`, `objective` and `search`, of these; empty for other sections. type: in words.
    default: as YAML, `required`, or empty for a section, whose keys have theirs. meaning: one or
    two sentences.
    """

    key: str
    kinds: tuple[str, ...]
    type: str
    default: str
    meaning: str


_REQUIRED = "required"
"""In place of a default; compared by identity."""

_OF_FILES = (
    Setting(
        "base",
        (),
        "text",
        "null",
        "Another config, a file or a packaged one, whose settings come first; keys of this file "
        "are then dotted, as on the command line.",
    ),
    Setting(
        "slices",
        (),
        "a mapping",
        "{}",
        "Slice, such as v5p:4x4x4 -> its settings by dotted key; `--slice` puts them on top.",
    ),
)
"""Keys of a file that are gone once it is read (`settings_on_top`)."""


def every_setting() -> list[Setting]:
    """All keys in the order of their declarations; those of several kinds are one where they
    agree."""
    merged: dict[Setting, tuple[str, ...]] = {}
    for each in (*_OF_FILES, *_keys_below(RunConfig, "", ())):
        alone = replace(each, kinds=())
        merged[alone] = tuple(dict.fromkeys((*merged.get(alone, ()), *each.kinds)))
    return [replace(each, kinds=kinds) for each, kinds in merged.items()]


def explain(name: str) -> list[Setting]:
    """The settings that `name` means, with the keys below it where it is one section.

    Args:
      name: a key, whole or its end: `stages.NAME.loss.clip_low`, `stages.rl.loss.clip_low`,
        `loss.clip_low`; or what TRL, tunix or verl call it. Or a value that has a name: a kind
        of stage, objective, search or rewriting (`sft`, `gspo`), a reward (`accuracy`), or a field
        of a dataset's rows (`response`).

    Raises:
      ConfigError: there is none; it names the nearest, or why there is none.
    """
    settings = every_setting()
    asked = [part for part in name.partition("=")[0].split(".") if part]
    exact = [each for each in settings if _matches(each.key.split("."), asked)]
    matches = exact or [
        each for each in settings if asked and _matches(each.key.split(".")[-len(asked) :], asked)
    ]
    if not exact:  # beta is a setting's, and TRL's name of another one
        known = {each.key for each in matches}
        elsewhere = _from_elsewhere(name)
        matches += [each for each in settings if each.key in elsewhere and each.key not in known]
        matches += _of_value(name, settings)
    if not matches:
        reason = no_counterpart(name)
        known = {each.key.rpartition(".")[2] for each in settings}
        known |= {kind for each in settings for kind in each.kinds}
        known |= {*FIELDS, *_rewards()}
        near = difflib.get_close_matches(asked[-1] if asked else "", sorted(known), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `r1jax explain stages`"
        raise ConfigError([f"{name}: no setting of this name; {reason or hint}"])
    if len({each.key for each in matches}) > 1:
        return matches
    below = f"{matches[0].key}."
    return matches + [each for each in settings if each.key.startswith(below)]


def _of_value(name: str, settings: Sequence[Setting]) -> list[Setting]:
    """What there is to say of a value that has a name of its own, and of the keys that take it.

    Of a kind of stage its own keys only: those of its sections would hide them.
    """
    if name in KINDS:
        keys = [each for each in settings if name in each.kinds and each.key.count(".") == 2]
        about = _first_paragraph(load_kind(name))
        about += " Its keys follow; `r1jax explain stages.NAME.KEY` lists those of a section."
        return [Setting(f"kind: {name}", (), "a kind of stage", "", about), *keys]
    if keys := [each for each in settings if name in each.kinds]:
        return keys
    if name in _rewards():
        about = inspect.getdoc(REWARDS[name].function) or ""
        about = " ".join(about.partition("\n\nRaises:")[0].split())
        keys = [each for each in settings if each.key.startswith("rewards.NAME.")]
        return [Setting(f"rewards.{name}", (), "a reward", "", about), *keys]
    if name in FIELDS:
        keys = [each for each in settings if each.key == "data.NAME.fields"]
        return [Setting(name, (), "a field of a dataset's rows", "", FIELDS[name]), *keys]
    return []


def _rewards() -> list[str]:
    """Rewards that a config may name; one with `_` in front is used by others."""
    return [name for name in REWARDS if not name.startswith("_")]


def _first_paragraph(section: type) -> str:
    return (inspect.getdoc(section) or "").partition("\n\n")[0].replace("\n", " ")


def other_names_of(key: str) -> dict[str, list[str]]:
    """Library -> what it calls a key."""
    names: dict[str, list[str]] = {}
    for library, table in OTHER_NAMES.items():
        for theirs, here in table.items():
            if key in _keys_in(here):
                names.setdefault(library, []).append(theirs)
    return names


def _keys_in(text: str) -> list[str]:
    """The keys that an entry of `OTHER_NAMES` names."""
    return re.split(r", | or | and ", text)


def _from_elsewhere(name: str) -> Sequence[str]:
    return [key for names in OTHER_NAMES.values() if name in names for key in _keys_in(names[name])]


def _matches(key: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether `asked` is this key, with any names for NAME and N."""
    return len(key) == len(asked) and all(
        here in (there, "NAME", "N") for here, there in zip(key, asked, strict=True)
    )


def _keys_below(
    section: type, prefix: str, kinds: tuple[str, ...], given: JsonValue = None
) -> Iterator[Setting]:
    """The keys of a section, each followed by those below it; `given`: its default, a mapping."""
    for name, field in keys_of(section).items():
        key, default = prefix + name, _default(field)
        if issubclass(section, Stage) and name == "kind":  # which a config cannot leave out
            field, default = Stage.model_fields["kind"], _REQUIRED
        if isinstance(given, dict):
            default = given[name]
        is_section, below = _below(field.annotation, key, kinds, default)
        shown = "" if is_section and isinstance(default, dict) else show(default)
        yield Setting(
            key,
            kinds,
            "a section" if is_section else describe(field),
            "required" if default is _REQUIRED else shown,
            meaning_of(section, name, field),
        )
        yield from below


def _below(
    annotation: object, key: str, kinds: tuple[str, ...], default: JsonValue
) -> tuple[bool, list[Setting]]:
    """Whether a key is itself a section, and the keys below it."""
    parts, is_section = alternatives(annotation), False
    settings: list[Setting] = []
    several = len([part for part in parts if keys_of(part)]) > 1
    for part in parts:
        if get_origin(part) in (list, dict):
            entry = "N" if get_origin(part) is list else "NAME"
            inner = get_args(part)[-1]
            if Stage in alternatives(inner):
                for kind in KINDS:
                    settings += _keys_below(load_kind(kind), f"{key}.NAME.", (kind,))
            else:
                settings += _below(inner, f"{key}.{entry}", kinds, None)[1]
        elif keys_of(part):
            is_section = True
            named = get_args(keys_of(part)["kind"].annotation) if several else ()
            alternative = named or (("package.module:name",) if several else ())
            settings += _keys_below(part, f"{key}.", alternative or kinds, default)
    return is_section, settings


def meaning_of(section: type, name: str, field: FieldInfo) -> str:
    """A field's description: its declaration's, that of the class it overrides, an entry of the
    class's docstring, or the first sentence about the section that it holds."""
    if field.description:
        return field.description
    for base in section.__mro__[1:]:
        above = keys_of(base).get(name)
        if above is not None and above.description:
            return above.description
    for base in section.__mro__:
        if name in (entries := _docstring_entries(base)):
            return entries[name]
    # Of a section what it is; of the kind of one what the section is.
    parts = [part for part in alternatives(field.annotation) if keys_of(part)]
    parts = [section] if name == "kind" else parts
    return _first_paragraph(parts[0]) if parts else ""


def _docstring_entries(section: type) -> Mapping[str, str]:
    """`name, name: text` of a docstring; the text may go on in lines that are indented."""
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc(section.__doc__ or "").splitlines():
        head, colon, text = line.partition(":")
        if colon and re.fullmatch(r"[a-z_0-9]+(, [a-z_0-9]+)*", head):
            names = head.split(", ")
            entries |= dict.fromkeys(names, text.strip())
        elif names and line.startswith("    "):
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
        else:
            names = []
    return entries


def _default(field: FieldInfo) -> JsonValue:
    if field.is_required():
        return _REQUIRED
    default = field.get_default(call_default_factory=True, validated_data={})
    plain: JsonValue = to_jsonable_python(default, fallback=str)
    return plain
