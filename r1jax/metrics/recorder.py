"""The metric files of a stage, which a resumed run continues to the byte.

`metrics.jsonl`, `samples.jsonl` and `held_out.jsonl` depend on the seed only, so two runs of one
config write equal bytes; wall-clock figures go to `timings.jsonl`. The cursor (a byte offset per
file) is saved in the checkpoint. Trackers show metrics and timings and are never read back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import jax
import numpy as np

from r1jax.files import encode_line, end_of_last_line
from r1jax.metrics.trackers import Tracker, open_tracker

Row: TypeAlias = Mapping[str, Any]
"""Name -> value: a number, or a numpy or jax scalar; in samples and summaries any JSON."""

FILES = ("metrics.jsonl", "timings.jsonl", "samples.jsonl", "held_out.jsonl")


class Recorder:
    """Writes the metric files of one stage, and shows them in the trackers.

    Opening a directory keeps what is in it, except for a last line that a killed process left
    unfinished. Call `rewind` next: with the checkpoint's cursor, or with {} when there is none.

    Args:
      directory: of the stage; made if it is missing.
      trackers: any of "tensorboard", "wandb"; ModuleNotFoundError where one is not installed.
      run_name, config: of the whole run, for trackers.
      process_index: a process other than 0 writes nothing, and its cursor is empty.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        trackers: Sequence[str] = (),
        *,
        run_name: str = "",
        config: Mapping[str, object] | None = None,
        process_index: int = 0,
    ) -> None:
        self.directory = Path(directory)
        self._active = process_index == 0
        self._files: dict[str, BinaryIO] = {}
        self._trackers: list[Tracker] = []
        if self._active:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                self._files[name] = open(self.directory / name, "ab")
                self._files[name].truncate(end_of_last_line(self.directory / name))
            self._trackers = [
                open_tracker(name, self.directory, run_name or self.directory.name, config or {})
                for name in trackers
            ]

    def log(self, step: int, metrics: Row) -> None:
        """Appends {"step": step, **metrics} to metrics.jsonl; `step` counts optimizer updates.

        Metrics are numbers, numpy scalars or zero-dimensional jax arrays, fetched together. nan and
        infinities become the strings "nan", "inf" and "-inf", as JSON has no such numbers. Raises
        TypeError for a value that has not exactly one element, or is no number (it is named).
        """
        self._log("metrics.jsonl", step, metrics, time.time())

    def log_timings(self, step: int, timings: Row) -> None:
        """Appends {"step", "time" (seconds since 1970), **timings} to timings.jsonl; like `log`."""
        now = time.time()
        self._log("timings.jsonl", step, {"time": now, **timings}, now)

    def log_samples(self, rows: Iterable[Row]) -> None:
        """Appends rows (JSON mappings; numpy and jax scalars allowed) to samples.jsonl."""
        if self._active:
            self._append("samples.jsonl", b"".join(encode_line(row) for row in rows))

    def log_held_out(self, step: int, summary: Row) -> None:
        """Appends {"step": step, **summary} (a JSON mapping) to held_out.jsonl."""
        if self._active:
            self._append("held_out.jsonl", encode_line({"step": int(step), **summary}))

    def cursor(self) -> dict[str, int]:
        """Bytes per file; returns once everything logged so far is on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        for tracker in self._trackers:
            tracker.flush()
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def rewind(self, cursor: Mapping[str, int]) -> None:
        """Cuts the files to `cursor` (see `cursor()`), so that the run continues from there.

        A file that it does not name is emptied. Raises ValueError for a file that is shorter.
        """
        if not self._active:
            return
        offsets = {name: int(cursor.get(name, 0)) for name in FILES}
        for name, offset in offsets.items():
            size = os.path.getsize(self.directory / name)
            if size < offset:
                raise ValueError(
                    f"{self.directory / name} has {size} bytes, but the checkpoint was saved when "
                    f"it had {offset}: it was changed or removed since. Put it back, or remove "
                    f"{self.directory} to run the stage again"
                )
        for name, offset in offsets.items():
            self._files[name].truncate(offset)  # opened to append: the next write goes there
        for tracker in self._trackers:
            tracker.rewind()

    def close(self) -> None:
        """Closes files and trackers; may be called twice."""
        if self._files:
            self.cursor()
        for file in self._files.values():
            file.close()
        self._files = {}
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log(self, name: str, step: int, values: Row, now: float) -> None:
        if not self._active:
            return
        numbers = _numbers(values)
        self._append(name, encode_line({"step": int(step), **numbers}))
        shown = {key: float(value) for key, value in numbers.items() if key != "time"}
        for tracker in self._trackers:
            tracker.write(int(step), shown, now)

    def _append(self, name: str, data: bytes) -> None:
        if name not in self._files:
            raise ValueError(f"{self.directory / name} is closed")
        self._files[name].write(data)
        self._files[name].flush()


def _numbers(values: Row) -> dict[str, int | float]:
    # A list, because a dict would come back with sorted keys; together, because each fetch waits.
    fetched = jax.device_get(list(values.values()))
    numbers: dict[str, int | float] = {}
    for key, value in zip(values, fetched, strict=True):
        array = np.asarray(value)
        if array.size != 1 or not (
            np.issubdtype(array.dtype, np.number)
            or array.dtype == np.bool_
            or array.dtype.kind == "V"  # bfloat16 and the 8-bit floats
        ):
            raise TypeError(
                f"metric {key!r} is {value!r} (shape {array.shape}, {array.dtype}): log one number"
            )
        exact = array.dtype.kind in "iub"
        numbers[key] = int(array.item()) if exact else float(array.astype(np.float64).item())
    return numbers
