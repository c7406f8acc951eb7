"""What comes with r1jax: configs of runs, meshes by name, and the shapes of published models."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

_PACKAGE = Path(__file__).resolve().parents[1]
_MESHES = "mesh/"


def packaged_configs() -> dict[str, Path]:
    """The configs that come with r1jax: name, such as `tiny/r1_zero`, to file, sorted by name."""
    return {name: path for name, path in _packaged().items() if not name.startswith(_MESHES)}


def packaged_meshes() -> dict[str, Path]:
    """Name, such as `fsdp`, to file of configs/mesh."""
    return {
        name.removeprefix(_MESHES): path
        for name, path in _packaged().items()
        if name.startswith(_MESHES)
    }


def read_mesh(name: str) -> dict[str, Any]:
    """The mesh of this name, as from YAML.

    Raises:
      ValueError: there is none; the message names those that there are.
    """
    known = packaged_meshes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"{name!r}: no such mesh; {hint}")
    mesh: dict[str, Any] = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    return mesh


def packaged_shape(model: str) -> Path | None:
    """The `config.json` of a model on the hub, as published; None where it is not one of ours."""
    folder = _folder()
    path = None if folder is None else folder / "models" / f"{model}.json"
    return path if path is not None and path.is_file() else None


def _packaged() -> dict[str, Path]:
    folder = _folder()
    if folder is None:
        return {}
    files = sorted(folder.rglob("*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _folder() -> Path | None:
    # A wheel carries them inside the package; in a checkout they lie beside it.
    folders = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
    return next((folder for folder in folders if folder.is_dir()), None)
