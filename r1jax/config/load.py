"""Reads a YAML file and `key.path=value` overrides into a `RunConfig`, or says what is wrong.

All mistakes of a file and its command line are reported at once, each with its place, its value and
what belongs there. Relative paths in a config are relative to the working directory: a packaged
config must work from anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue, ValidationError

from r1jax.config.error_messages import messages, name_of
from r1jax.config.expected import stage_kinds
from r1jax.config.packaged import find_config
from r1jax.config.run_config import RunConfig
from r1jax.config.settings_on_top import put_overrides, put_slice, read_document, read_text
from r1jax.config.yaml_file import ConfigError as ConfigError
from r1jax.config.yaml_file import KeyPath, show, write_yaml
from r1jax.files import JsonObject
from r1jax.settings.data import DataSection


def load_config(
    name_or_path: str | Path, overrides: Sequence[str] = (), slice_name: str | None = None
) -> RunConfig:
    """Reads, overrides and checks one config. Touches no device.

    Overrides are `key.path=value`, the later winning. The value is YAML. A path steps into a list
    by index or by the `name` of the entry: `stages.rl.optimizer.learning_rate=1e-6`. A section that
    the file leaves out keeps its other defaults. The settings of `slice_name`, an entry of the
    config's `slices`, come before the overrides.

    Raises ConfigError with every problem of the file and of the overrides.
    """
    path = find_config(name_or_path)
    return parse_config(read_text(path), str(path), overrides, slice_name, path.parent)


def parse_config(
    text: str,
    source: str,
    overrides: Sequence[str] = (),
    slice_name: str | None = None,
    folder: Path | None = None,
) -> RunConfig:
    """As `load_config`, from YAML text.

    Args:
      source: what error messages call it.
      folder: where files of reward functions are looked for first.
    """
    document = read_document(text, source)
    if slice_name is not None:
        put_slice(document, slice_name)
    put_overrides(document, overrides)
    data = document.data
    not_filled_in = _fill_in(data)
    for path, problem in not_filled_in:
        document.add_problem(path, problem)
    try:
        # JSON mode is strict about types, so that "5", true or 5.0 is no integer, without asking
        # YAML for tuples and dataclasses.
        where = None if folder is None else str(folder.absolute())
        context = {"folder": where, "places": _by_name(data, document.places)}
        config = RunConfig.model_validate_json(json.dumps(data), strict=True, context=context)
    except ValidationError as error:
        # Without what should have been filled in, much is missing that was not forgotten.
        for path, problem in messages(data, error, unknown_keys_only=bool(not_filled_in)):
            document.add_problem(path, problem)
    if document.problems:
        raise ConfigError(document.problems)
    return config


def _by_name(data: JsonObject, places: Mapping[KeyPath, str]) -> dict[tuple[str, ...], str]:
    """The places of keys, with stages by their names, which later code knows them by."""
    stages = data.get("stages")
    names = {
        index: str(stage.get("name")) if isinstance(stage, dict) else str(index)
        for index, stage in enumerate(stages if isinstance(stages, list) else ())
    }
    named = {}
    for path, place in places.items():
        parts: list[object] = list(path)
        if len(parts) > 1 and parts[0] == "stages":
            parts[1] = names.get(parts[1], parts[1])  # type: ignore[call-overload]
        named[tuple(map(str, parts))] = place
    return named


def slices_of(name_or_path: str | Path) -> list[str]:
    """The slices that a config has settings for, in its order."""
    path = find_config(name_or_path)
    return list(read_document(read_text(path), str(path)).slices)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; `parse_config` reads it back to an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def _fill_in(config: JsonObject) -> list[tuple[KeyPath, str]]:
    """Puts into a config what its settings imply, such as `benchmark`; (key path, problem)."""
    given = config.get("data", {})
    datasets = given if isinstance(given, dict) else {}
    filled: list[tuple[KeyPath, JsonObject, dict[str, str]]] = [
        (("stages", index), stage, kind.fill_in(stage, datasets))
        for index, stage, kind in stage_kinds(config)
    ]
    for name, section in datasets.items():
        if isinstance(section, dict):
            filled.append((("data", name), section, DataSection.fill_in(section)))
    if datasets:
        config.setdefault("data", datasets)
    return [
        (
            (*path, *key.split(".")),
            f"{name_of(config, path)}.{key} = {_shown(section, key)}: {text}",
        )
        for path, section, problems in filled
        for key, text in problems.items()
    ]


def _shown(section: JsonObject, key: str) -> str:
    """The value of a dotted key."""
    value: JsonValue = section
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else None
    return show(value)
