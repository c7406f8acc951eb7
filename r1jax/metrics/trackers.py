"""Trackers, which show the metrics of a stage: TensorBoard and Weights & Biases.

Their packages are imported where they are used: tensorboardX brings PyTorch where there is one.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

from r1jax.files import read_rows

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

TRACKERS = ("tensorboard", "wandb")
_FLUSH_SECONDS = 10.0


class Tracker(Protocol):
    """Shows scalars by step. Nothing reads them back."""

    def write(self, step: int, numbers: Mapping[str, float], wall_time: float) -> None: ...

    def rewind(self) -> None:
        """Drops the steps that are no longer in the metric files, which were cut."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


def open_tracker(
    name: str, directory: Path, run_name: str, config: Mapping[str, object]
) -> Tracker:
    """Opens the tracker `name` for a stage whose metric files are in `directory`."""
    if name == "tensorboard":
        return _TensorBoard(directory)
    if name == "wandb":
        return _WeightsAndBiases(directory, run_name, config)
    raise ValueError(f"tracker = {name!r}: not one of {', '.join(TRACKERS)}")


class _TensorBoard:
    """An event file in DIRECTORY/tensorboard, made anew from the metric files when opened.

    The event files of a killed run end in a torn record and hold steps that the resumed run
    repeats; readers treat both differently. So the JSON lines, already cut, are written once more.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: EventsWriter | None = None
        self.rewind()

    def rewind(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self.close()
        target = self._directory / "tensorboard"
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob("events.out.tfevents.*"):
            stale.unlink()
        # The plain writer: SummaryWriter adds a queue, a thread and one event per number, and its
        # flush() does not empty the queue.
        self._writer = EventsWriter(str(target / "events"))
        self._flushed = time.monotonic()
        self._replay()
        self.flush()

    def write(self, step: int, numbers: Mapping[str, float], wall_time: float) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            raise ValueError(f"the event file in {self._directory} is closed")
        values = [Summary.Value(tag=tag, simple_value=float(x)) for tag, x in numbers.items()]
        event = Event(step=step, wall_time=wall_time, summary=Summary(value=values))
        self._writer.write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._writer is not None:
            self._flushed = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _replay(self) -> None:
        wall_times: dict[int, float] = {}
        timings = self._directory / "timings.jsonl"
        if timings.exists():
            for row in read_rows(timings):
                step, wall_times[step] = row.pop("step"), row.pop("time")
                self.write(step, row, wall_times[step])
        metrics = self._directory / "metrics.jsonl"
        if metrics.exists():
            written = metrics.stat().st_mtime
            for row in read_rows(metrics):
                step = row.pop("step")
                self.write(step, row, wall_times.get(step, written))


class _WeightsAndBiases:
    """One W&B run per stage, whose id is kept in DIRECTORY/wandb_id; a resumed stage goes on in it.

    W&B ignores steps that it already has, and a resumed run repeats those with the same numbers.
    """

    def __init__(self, directory: Path, run_name: str, config: Mapping[str, object]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise ModuleNotFoundError(
                "trackers names wandb, which is not installed: pip install 'r1jax[wandb]', or "
                "leave it out of trackers",
                name="wandb",
            ) from error
        id_file = directory / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid4().hex[:8])
        self._run = wandb.init(
            project="r1jax",
            group=run_name,
            name=f"{run_name}/{directory.name}",
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(directory),
            config=dict(config),
        )

    def write(self, step: int, numbers: Mapping[str, float], wall_time: float) -> None:
        # W&B keeps its own clock.
        self._run.log(dict(numbers), step=step)

    def rewind(self) -> None:
        """W&B cannot drop steps; it ignores repeated ones."""

    def flush(self) -> None:
        """W&B sends in the background."""

    def close(self) -> None:
        self._run.finish()
