"""Sources of rows: JSON lines, TFDS and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from r1jax.bucket import locate
from r1jax.files import JsonObject, numbered_rows
from r1jax.settings.names import nearest

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

    Blank lines are skipped. Raises FileNotFoundError, or ValueError for a line that is not a JSON
    object or a split that is not train.
    """
    _known_options("jsonl", options, ())
    if split != "train":
        raise ValueError(
            f"source = 'jsonl:{name}': split = {split!r}; a file is one split, train. For a held "
            "out share of it set held_out_fraction in both datasets"
        )
    path = locate(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"source = 'jsonl:{name}': no file {path} (looked in {Path.cwd()})")
    numbered = list(numbered_rows(path))
    rows = [row for _, row in numbered]
    return Rows(rows, lambda index: f"{path}:{numbered[index][0]}", in_memory=True)


def read_tfds(name: str, split: str, options: JsonObject) -> Rows:
    """`tfds:NAME`, `tfds:NAME/CONFIG` or with `:VERSION`, read by index and without TensorFlow.

    Options: `data_dir`, the folder of prepared datasets. A dataset that is not there is downloaded
    and prepared as ArrayRecord files, the format that can be read by index. Raises ImportError, or
    ValueError for an unknown dataset or split and a format without random access.
    """
    _known_options("tfds", options, ("data_dir",))
    where = f"source = 'tfds:{name}'"
    try:
        import array_record  # noqa: F401
        import importlib_resources  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"{where}: {error.name} is missing; "
            "pip install tensorflow-datasets array_record importlib_resources"
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
        raise ValueError(f"{where}: {str(error).strip().splitlines()[0]}") from error
    if split not in builder.info.splits:
        raise ValueError(
            f"{where}: split = {split!r}; the dataset has {', '.join(sorted(builder.info.splits))}"
        )
    try:
        rows = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"{where}: {builder.data_dir} holds {builder.info.file_format}, which cannot be read "
            "by index; set options.data_dir to another folder to prepare it as array_record"
        ) from error
    return Rows(rows=rows, label=lambda index: f"{split} row {index}", in_memory=False)


def read_hub(name: str, split: str, options: JsonObject) -> Rows:
    """`hf:NAME` with the package `datasets`. Options: `config`, `revision`, `data_files`.

    Raises ImportError without the package, ValueError for an unknown dataset, config or split.
    """
    _known_options("hf", options, ("config", "revision", "data_files"))
    where = f"source = 'hf:{name}'"
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{where}: the package datasets is missing; pip install 'r1jax[hf]' (or datasets)"
        ) from error
    try:
        files = {key: options.get(key) for key in ("revision", "data_files")}
        rows = datasets.load_dataset(name, options.get("config"), split=split, **files)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: split = {split!r}: {error}") from error
    return Rows(rows=rows, label=lambda index: f"{split} row {index}", in_memory=False)


def _known_options(kind: str, options: JsonObject, known: Sequence[str]) -> None:
    # `from_split` is taken out before a reader gets the options.
    all_known = (*known, "from_split (with held_out_fraction)")
    for option in options:
        if option not in known:
            raise ValueError(
                f"options.{option} is not an option of {kind}: {nearest(option, known)}known: "
                f"{', '.join(all_known)}"
            )
