"""JSON lines that every reader can split: one object per line, valid JSON whatever the numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# JSON allows these inside strings, but many readers split lines at them.
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def encode_line(row: Mapping[str, Any]) -> bytes:
    """One JSON object and a newline, UTF-8, with non-finite numbers as "nan", "inf", "-inf"."""
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).translate(_LINE_BREAKS)
    # A lone surrogate has no UTF-8; its \\udXXX escape is what JSON itself would write.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The finished rows of a JSON-lines file, in order; a torn last line is left out.

    Non-finite numbers stay the strings they were written as; `float()` reads them.
    """
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def end_of_last_line(path: Path) -> int:
    """Offset behind the last newline; what follows it is a line that was never finished.

    Searched from the end, as sample files can be large.
    """
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
