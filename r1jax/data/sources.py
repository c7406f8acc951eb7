"""Sources of rows: JSON lines, TFDS and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from r1jax.bucket import locate
from r1jax.files import JsonObject, JsonValue, numbered_values
from r1jax.settings.names import nearest
from r1jax.settings.section import SettingError

Row: TypeAlias = Mapping[str, Any]
"""Column -> value, as the source has it."""


@dataclass(frozen=True)
class Rows:
    """Rows of a source; indexing may read from disk, unless `in_memory`. `label` names a row."""

    rows: Sequence[Row]
    label: Callable[[int], str]
    in_memory: bool


def read_jsonl(name: str, split: str, options: JsonObject) -> Rows:
    """`jsonl:PATH`: one JSON object per line of a UTF-8 file, local or on a bucket (`gs://...`).

    A line that is a list of turns is a row with these as `messages`. Blank lines are skipped.
    Raises FileNotFoundError; SettingError: a line that is neither, or a split that is not train.
    """
    _known_options("jsonl", options, ())
    if split != "train":
        raise SettingError(
            "split",
            "a file is one split, train. For a held out share of it set held_out_fraction in both "
            "datasets",
        )
    path = locate(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked in {Path.cwd()})")
    try:
        numbered = list(numbered_values(path))
    except ValueError as error:
        raise SettingError("source", str(error)) from error
    rows = [_row(value, f"{path}:{line}") for line, value in numbered]
    return Rows(rows, lambda index: f"{path}:{numbered[index][0]}", in_memory=True)


def _row(value: JsonValue, where: str) -> Row:
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return {"messages": value}
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise SettingError(
            "source", f"{where}: a {kind}; needs one JSON object per line, or a list of turns"
        )
    return value


def read_tfds(name: str, split: str, options: JsonObject) -> Rows:
    """`tfds:NAME`, `tfds:NAME/CONFIG` or with `:VERSION`, read by index and without TensorFlow.

    Options: `data_dir`, the folder of prepared datasets. A dataset that is not there is downloaded
    and prepared as ArrayRecord files, the format that can be read by index. Raises SettingError: a
    package is missing, an unknown dataset or split, or a format without random access.
    """
    _known_options("tfds", options, ("data_dir",))
    try:
        import array_record  # noqa: F401
        import importlib_resources  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise SettingError(
            "source",
            f"{error.name} is missing; "
            "pip install tensorflow-datasets array_record importlib_resources",
        ) from error
    import r1jax.data.tfds.r1jax_tasks  # noqa: F401  (importing a builder registers it)

    data_dir = options.get("data_dir")
    try:
        # Without file_format first: a prepared dataset is read in its format.
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
        if not builder.is_prepared():
            how = {"data_dir": data_dir, "try_gcs": False, "file_format": "array_record"}
            builder = tfds.builder(name, **how)
            builder.download_and_prepare()
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        # TFDS reports an unknown version by a failed assertion.
        raise SettingError("source", str(error).strip().splitlines()[0]) from error
    if split not in builder.info.splits:
        raise SettingError("split", f"the dataset has {', '.join(sorted(builder.info.splits))}")
    try:
        rows = builder.as_data_source(split)
    except NotImplementedError as error:
        raise SettingError(
            "source",
            f"{builder.data_dir} holds {builder.info.file_format}, which cannot be read "
            "by index; set options.data_dir to another folder to prepare it as array_record",
        ) from error
    return Rows(rows=rows, label=lambda index: f"{split} row {index}", in_memory=False)


def read_hub(name: str, split: str, options: JsonObject) -> Rows:
    """`hf:NAME` with the package `datasets`. Options: `config`, `revision`, `data_files`.

    Raises SettingError: the package is missing, or an unknown dataset, config or split.
    """
    _known_options("hf", options, ("config", "revision", "data_files"))
    try:
        import datasets
    except ImportError as error:
        raise SettingError(
            "source", "the package datasets is missing; pip install 'r1jax[hf]' (or datasets)"
        ) from error
    try:
        files = {key: options.get(key) for key in ("revision", "data_files")}
        rows = datasets.load_dataset(name, options.get("config"), split=split, **files)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingError("source", f"split = {split!r}: {reason}") from error
    return Rows(rows=rows, label=lambda index: f"{split} row {index}", in_memory=False)


def _known_options(kind: str, options: JsonObject, known: Sequence[str]) -> None:
    # `from_split` is taken out before a reader gets the options.
    all_known = (*known, "from_split (with held_out_fraction)")
    for option in options:
        if option not in known:
            raise SettingError(
                f"options.{option}",
                f"no option of {kind}; {nearest(option, known)}known: {', '.join(all_known)}",
            )
