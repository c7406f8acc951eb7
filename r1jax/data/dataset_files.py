"""Datasets that rejection sampling writes: completions to train on, each with its origin."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from r1jax.data.sources import Row, read_jsonl
from r1jax.files import JsonObject, encode_line, written_whole
from r1jax.settings.names import nearest


@dataclass(frozen=True)
class Provenance:
    """The origin of a completion; enough to sample it again.

    Attributes:
        checkpoint: The weights, such as the name of the stage that trained them.
        stage: The stage that sampled.
        seed: Of the run.
        step: Batch of the sampling stage in which it was drawn, from 0.
        sample_index: Its index among the prompt's samples.
        problem_id: `Example.id` of the prompt.
        sampling: Name -> value (JSON) of temperature, top_p and the like.
        versions: Package -> version.
        rewriter: The rewriter of the completion; None: it is as sampled.
    """

    checkpoint: str
    stage: str
    seed: int
    step: int
    sample_index: int
    problem_id: int
    sampling: dict[str, str | int | float | bool | None]
    versions: dict[str, str]
    rewriter: str | None = None

    def __post_init__(self) -> None:
        """ValueErrors begin with the name of the field."""
        for name in ("checkpoint", "stage"):
            _check_text(f"provenance.{name}", getattr(self, name))
        for name in ("seed", "step", "sample_index", "problem_id"):
            _check_whole(f"provenance.{name}", getattr(self, name), least=0)
        for name in ("sampling", "versions"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"provenance.{name} = {getattr(self, name)!r}: must be a dict")
        for key, value in self.sampling.items():
            _check_text("provenance.sampling: a name", key)
            if isinstance(value, str):
                _check_text(f"provenance.sampling.{key}", value, blank=True)
            elif value is not None and not isinstance(value, bool):
                _check_number(f"provenance.sampling.{key}", value)
        for key, value in self.versions.items():
            _check_text("provenance.versions: a name", key)
            _check_text(f"provenance.versions.{key}", value)
        if self.rewriter is not None:
            _check_text("provenance.rewriter", self.rewriter)


@dataclass(frozen=True)
class DatasetRow:
    """A question and its response.

    Attributes:
        prompt: The question, without template.
        response: The whole answer, a prefilled `<think>` included.
        answer: The reference answer; empty when there is none.
        domain: Free label of the row's source.
        tokens: Of the response.
        reward: Of the completion.
        provenance: Its origin.
    """

    prompt: str
    response: str
    answer: str
    domain: str
    tokens: int
    reward: float
    provenance: Provenance

    def __post_init__(self) -> None:
        """ValueErrors begin with the name of the field."""
        for name in ("prompt", "response"):
            _check_text(name, getattr(self, name))
        for name in ("answer", "domain"):
            _check_text(name, getattr(self, name), blank=True)
        _check_whole("tokens", self.tokens, least=1)
        _check_number("reward", self.reward)
        if not isinstance(self.provenance, Provenance):
            raise ValueError(f"provenance = {self.provenance!r}: must be a Provenance")


def write_dataset(path: str | os.PathLike[str], rows: Iterable[DatasetRow]) -> None:
    """Writes JSON lines that `jsonl:PATH` and `read_dataset` read; a reader never sees half a file.

    `rows` may be an iterator; if it raises, what was at `path` before is still there.

    Raises:
        ValueError: there are no rows.
    """
    with written_whole(Path(path)) as partial, partial.open("wb") as file:
        for row in rows:
            file.write(encode_line(asdict(row)))
        if not file.tell():
            raise ValueError(f"{path}: no rows to write")
        file.flush()
        os.fsync(file.fileno())


def read_dataset(path: str | os.PathLike[str]) -> list[DatasetRow]:
    """The rows that `write_dataset` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a column, has one too many, or one with a bad value (names file,
            line and column).
    """
    rows = read_jsonl(os.fspath(path), "train", {})
    return [_read_row(row, rows.label(index)) for index, row in enumerate(rows.rows)]


def write_tfds(
    jsonl_path: str | os.PathLike[str], data_dir: str | os.PathLike[str], name: str
) -> Path:
    """Writes the rows of a dataset file as a TFDS dataset, for `tfds:NAME` with that `data_dir`.

    The files are ArrayRecords, written and read without TensorFlow. A dataset of that name there is
    replaced.

    Returns:
        The dataset's folder.

    Raises:
        FileNotFoundError, ValueError: as `read_dataset`; or there are no rows, or the name is not
            in lower_case_with_underscores or is another dataset's.
    """
    import tensorflow_datasets as tfds

    import r1jax.data.tfds.r1jax_tasks  # noqa: F401  (importing a builder registers its name)
    from r1jax.data.tfds.dataset_rows import Builder

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(f"name = {name!r}: TFDS needs lower_case_with_underscores")
    if name in tfds.list_builders(with_community_datasets=False):
        raise ValueError(f"name = {name!r}: TFDS has a dataset of this name; choose another")
    rows = read_dataset(jsonl_path)
    if not rows:
        raise ValueError(f"{jsonl_path}: no rows to write")
    columns = ({**vars(row), "provenance": json.dumps(vars(row.provenance))} for row in rows)
    builder = Builder(name, columns, os.fspath(data_dir))
    replace = tfds.download.DownloadConfig(
        download_mode=tfds.download.GenerateMode.REUSE_CACHE_IF_EXISTS
    )
    # TFDS prints much that a user of this function knows already.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=replace)
    return Path(builder.data_dir)


def dataset_card(rows: Sequence[DatasetRow]) -> JsonObject:
    """Rows and mean tokens of a response, in total and by domain.

    These are the columns of DeepSeek-R1's table of its 800K set.
    """
    by_domain: dict[str, list[int]] = {}
    for row in rows:
        by_domain.setdefault(row.domain, []).append(row.tokens)
    return {
        **_count([row.tokens for row in rows]),
        "domains": {domain: _count(by_domain[domain]) for domain in sorted(by_domain)},
    }


def _count(tokens: Sequence[int]) -> JsonObject:
    return {"rows": len(tokens), "mean_tokens": sum(tokens) / len(tokens) if tokens else None}


def _read_row(columns: Row, where: str) -> DatasetRow:
    _check_columns(columns, DatasetRow, where, "")
    origin = columns["provenance"]
    if not isinstance(origin, dict):
        raise ValueError(f"{where}: provenance = {origin!r}: must be a JSON object")
    _check_columns(origin, Provenance, where, "provenance.")
    try:
        return DatasetRow(**{**columns, "provenance": Provenance(**origin)})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_columns(columns: Row, kind: type, where: str, prefix: str) -> None:
    known = {each.name: each.default is MISSING for each in fields(kind)}
    for name in columns:
        if name not in known:
            raise ValueError(
                f"{where}: {prefix}{name} is not a column; {nearest(name, known)}there are "
                f"{', '.join(known)}"
            )
    for name, needed in known.items():
        if needed and name not in columns:
            raise ValueError(f"{where}: {prefix}{name} is missing")


def _check_text(name: str, value: object, *, blank: bool = False) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} = {value!r}: must be text")
    if not blank and not value.strip():
        raise ValueError(f"{name} = {value!r}: must not be blank")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} = {value[:80]!r}: no Unicode text: {error.reason}") from None


def _check_whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r}: must be an int of at least {least}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: must be a finite int or float")
