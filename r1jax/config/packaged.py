"""What comes with r1jax: configs of runs, meshes by name, and the shapes of published models."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from r1jax.config.yaml_file import ConfigError, read_yaml

if TYPE_CHECKING:
    from r1jax.files import JsonObject

_PACKAGE = Path(__file__).resolve().parents[1]
_MESHES = "mesh/"


def packaged_configs() -> dict[str, Path]:
    """The configs that come with r1jax: name, such as `tiny/r1_zero`, to file, sorted by name."""
    return {name: path for name, path in _packaged().items() if not name.startswith(_MESHES)}


def packaged_meshes() -> dict[str, Path]:
    """Name, such as `fsdp`, to file of configs/mesh."""
    meshes = ((name, path) for name, path in _packaged().items() if name.startswith(_MESHES))
    return {name.removeprefix(_MESHES): path for name, path in meshes}


def find_config(name_or_path: str | Path) -> Path:
    """The file meant by `name_or_path`: an existing file (on a bucket, too), or a packaged config.

    Raises ConfigError, which names the nearest packaged configs.
    """
    path = Path(name_or_path)
    try:
        if "://" in str(name_or_path):
            from r1jax.bucket import locate  # what it imports would delay each mistake in a config

            path = locate(name_or_path)
        if path.is_file():
            return path
    except OSError as error:  # a name that is too long, or a folder that may not be read
        reason = error.strerror or error
        raise ConfigError([f"{str(name_or_path)[:100]}: {reason}"]) from None
    except ValueError as error:  # another scheme than gs://
        raise ConfigError([str(error)]) from None
    known = packaged_configs()
    name = path.with_suffix("").as_posix() if path.suffix == ".yaml" else path.as_posix()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    # A bare `r1_zero` is no close match of `tiny/r1_zero`, yet what was meant is plain.
    near += [key for key in known if name in key.split("/") and key not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"packaged: {', '.join(known)}"
    raise ConfigError([f"{name_or_path}: neither a file nor a packaged config; {hint}"])


def read_mesh(name: str) -> JsonObject:
    """The mesh of this name, as from YAML; ValueError, which names those that there are."""
    known = packaged_meshes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"mesh = {name!r}: no such mesh; {hint}")
    return cast("JsonObject", read_yaml(known[name].read_text(encoding="utf-8")).data)


def packaged_shape(model: str) -> Path | None:
    """The `config.json` of a model on the hub, as published; None where it is not one of ours."""
    path = _folder() / "models" / f"{model}.json"
    return path if path.is_file() else None


def _packaged() -> dict[str, Path]:
    folder = _folder()
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _folder() -> Path:
    # A wheel carries them inside the package; in a checkout they lie beside it.
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"
