"""A model's directory, and the configs in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from r1jax.bucket import check_readable, locate, on_bucket
from r1jax.config.packaged import packaged_shape
from r1jax.files import JsonObject
from r1jax.models.config import ModelConfig

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Some repositories hold the same weights a second time, in their authors' own format.
_OTHER_FORMATS = ["*/*", "consolidated*"]


def resolve(path_or_name: str) -> Path:
    """The directory (local, or on a bucket) of this name; else the hub's repository, downloaded.

    Raises ValueError for neither a directory nor a repository that can be reached.
    """
    if (path := _directory(path_or_name)) is not None:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            path_or_name, allow_patterns=_PATTERNS, ignore_patterns=_OTHER_FORMATS
        )
        return Path(folder)
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise ValueError(
            f"model {path_or_name!r}: not a directory here, and the hub does not give it "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}). Check the name; without "
            "a network, copy the model's directory to this machine and give its path"
        ) from error


def find_config(path_or_name: str) -> JsonObject:
    """`config.json` for a plan: of a local directory, of r1jax itself, or of a hub repository.

    The published shapes that come with r1jax need no network and give the same plan on every
    machine; a run reads the model's file, and `differences_from_published` compares the two.
    """
    if (path := _directory(path_or_name)) is not None:
        return read_config(path)
    if (packaged := packaged_shape(path_or_name)) is not None:
        return read_mapping(packaged)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return read_mapping(Path(hf_hub_download(path_or_name, "config.json")))
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        raise ValueError(
            f"model {path_or_name!r}: not a directory here, and the hub does not give its "
            f"config.json ({(str(error).splitlines() or [type(error).__name__])[0]})"
        ) from error


def _directory(path_or_name: str) -> Path | None:
    """An existing directory; None if the name may be one of the hub's."""
    path = locate(path_or_name).expanduser()
    if path.is_dir():
        return path
    if on_bucket(path_or_name):
        check_readable(path_or_name)  # without a network, too, nothing is a directory
        raise ValueError(f"model {path_or_name!r}: nothing on the bucket has this name")
    return None


def differences_from_published(name: str, config: ModelConfig) -> list[str]:
    """How a model of the hub differs from the shape that plans use for its name."""
    packaged = packaged_shape(name)
    if packaged is None:
        return []
    published = asdict(ModelConfig.from_hugging_face(read_mapping(packaged)))
    return [
        f"{key} = {value!r}, planned with {published[key]!r}"
        for key, value in asdict(config).items()
        if value != published[key]
    ]


def read_config(directory: Path) -> JsonObject:
    """`config.json` of a directory."""
    path = locate(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no config.json: is it a Hugging Face model directory?")
    return read_mapping(path)


def read_generation_config(directory: Path) -> JsonObject | None:
    """`generation_config.json` of a directory, or None; it names all EOS ids of a chat model."""
    path = locate(directory) / "generation_config.json"
    return read_mapping(path) if path.is_file() else None


def read_mapping(path: Path) -> JsonObject:
    """A JSON file that holds a mapping; raises ValueError for another content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a mapping")
    return content
