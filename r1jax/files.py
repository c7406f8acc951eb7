"""Files written whole or not at all, and JSON lines that every reader can split."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

JsonValue: TypeAlias = (
    "str | int | float | bool | None | list[JsonValue] | tuple[JsonValue, ...] "
    "| Mapping[str, JsonValue]"
)
"""What JSON can hold."""

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object as it was read; whoever takes a value out checks it."""

# JSON allows these inside strings, but many readers split lines at them.
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which is renamed to `path` when the block ends.

    A reader never sees half a file; if the block raises, what was at `path` before is still there.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes a file whole or not at all; returns its path."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, content: Mapping[str, object]) -> Path:
    """Writes an indented JSON file whole or not at all; returns its path."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def encode_line(row: Mapping[str, object]) -> bytes:
    """One JSON object and a newline, UTF-8; non-finite numbers become "nan", "inf" or "-inf".

    Arrays and scalars of numpy and jax become lists and numbers.
    """
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).translate(_LINE_BREAKS)
    # A lone surrogate has no UTF-8; its \\udXXX escape is what JSON itself would write.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_rows(path: str | os.PathLike[str]) -> Iterator[JsonObject]:
    """The rows of a JSON-lines file, in order; an unfinished last line is left out.

    Non-finite numbers stay the strings they were written as. Raises as `numbered_rows`.
    """
    return (row for _, row in numbered_rows(Path(path), finished=True))


def numbered_rows(path: Path, *, finished: bool = False) -> Iterator[tuple[int, JsonObject]]:
    """(line number from 1, object) for each line of a UTF-8 file that is not blank.

    Raises ValueError as `numbered_values`, and for a line that is not a JSON object.
    """
    for number, row in numbered_values(path, finished=finished):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{path}:{number}: a {kind}; needs one JSON object per line")
        yield number, row


def numbered_values(path: Path, *, finished: bool = False) -> Iterator[tuple[int, JsonValue]]:
    """(line number from 1, value) for each line of a UTF-8 file that is not blank.

    finished: leave a last line without its newline out: it may still be written. Raises ValueError
    for a line that is not JSON, as `file:line: what is wrong`.
    """
    with path.open("rb") as file:  # bytes: only "\n" ends a line, and bad UTF-8 has a line number
        for number, line in enumerate(file, start=1):
            if not line.strip() or (finished and not line.endswith(b"\n")):
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not a JSON line: {error}") from None


def end_of_last_line(path: Path) -> int:
    """Offset in bytes after the last newline; what follows is a line that was never finished."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _plain(value: Any) -> JsonValue:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a scalar; neither numpy nor jax is imported for it
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    plain: JsonValue = value
    return plain


def plain_json(value: object) -> JsonValue:
    """A value as JSON holds it: bytes are UTF-8 text, arrays lists.

    Raises:
      TypeError, ValueError: JSON cannot hold it.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    raise TypeError(f"JSON has no {type(value).__name__}")
