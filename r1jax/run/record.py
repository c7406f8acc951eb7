"""Where a run's files are; and run.json: status and seconds of each stage, and what decided it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import yaml

from r1jax.bucket import WorkingCopy, locate, on_bucket
from r1jax.config.lineage import differences, ingredients
from r1jax.config.run_config import RunConfig
from r1jax.files import JsonObject, write_text
from r1jax.processes import wait_for_all
from r1jax.settings.stage import Stage


@dataclass(frozen=True)
class RunFiles:
    """The directory of a run, and of each of its `stages`.

    directory: where files are written; of a run on a bucket, the working copy.
    copy: that working copy; None where the output is a local folder.
    """

    directory: Path
    stages: tuple[str, ...]
    copy: WorkingCopy | None = None

    @staticmethod
    def of(config: RunConfig) -> RunFiles:
        """The files of a run in `output/NAME-sSEED`."""
        home = locate(config.output) / f"{config.name}-s{config.seed}"
        copy = WorkingCopy(str(home)) if on_bucket(home) else None
        names = tuple(stage.name for stage in config.stages)
        return RunFiles(home if copy is None else copy.directory, names, copy)

    def home(self, path: Path) -> Path:
        """Where a path in the run's directory lasts: the path, or its address on the bucket."""
        return path if self.copy is None else self.copy.remote(path)

    def push(self) -> None:
        """Brings what was written so far to where it lasts."""
        if self.copy is not None:
            self.copy.push()

    def pull(self) -> None:
        """Brings what other processes or former runs left on the bucket here."""
        if self.copy is not None:
            self.copy.pull()

    def wait_for_files(self, where: str) -> None:
        """Returns once every process has arrived and sees the files that process 0 wrote."""
        if jax.process_index() == 0:
            self.push()
        wait_for_all(where)
        if jax.process_index() > 0:
            self.pull()

    def stage_directory(self, name: str) -> Path:
        """`stages/NN-name`; the number stays what it was when the stage began."""
        stages = self.directory / "stages"
        for path in sorted(stages.glob("*-*")):
            if path.name.partition("-")[2] == name:
                return path
        return stages / f"{self.stages.index(name):02d}-{name}"

    def trained(self, stage: str) -> Path:
        """The Hugging Face directory that a train stage leaves."""
        return self.home(self.stage_directory(stage) / "model")


@dataclass(frozen=True)
class Record:
    """The record of a run; process 0 writes it, all processes keep the same one."""

    config: RunConfig
    files: RunFiles
    content: JsonObject

    def mark(self, stage: Stage, status: str, seconds: Mapping[str, float]) -> None:
        """Note a stage's status and its seconds by phase."""
        self.content["stages"][stage.name] = {
            **self.content["stages"].get(stage.name, {}),
            "kind": stage.kind,
            "status": status,
            "seconds": dict(seconds),
            "ingredients": ingredients(self.config, stage.name),
        }
        self._write()
        self.files.push()

    def note_machine(self, stage: Stage, figures: Mapping[str, float]) -> None:
        """Note compilations and memory of a stage, of the process that ended it."""
        self.content["stages"][stage.name]["machine"] = dict(figures)
        self._write()

    def status(self, name: str) -> str | None:
        """`running`, `done`, or None for a stage that has not begun."""
        status: str | None = self.content["stages"].get(name, {}).get("status")
        return status

    def seconds(self, name: str) -> dict[str, float]:
        """Seconds by phase that a stage has taken so far."""
        return dict(self.content["stages"].get(name, {}).get("seconds", {}))

    def _write(self) -> None:
        if jax.process_index() == 0:
            text = json.dumps(self.content, indent=2) + "\n"
            write_text(self.files.directory / "run.json", text)


def open_record(config: RunConfig, files: RunFiles) -> Record:
    """Create the run's directory, or continue in it if its results are still the config's.

    Process 0 writes; the others wait and read the same files.

    Raises:
      ValueError: a stage that has begun is no longer what the config says.
    """
    if jax.process_index() > 0:
        wait_for_all("open_record")
    files.pull()
    files.directory.mkdir(parents=True, exist_ok=True)
    path = files.directory / "run.json"
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content: JsonObject = {"name": config.name, "seed": config.seed, "started": started}
    content["stages"] = {}
    if path.exists():
        content = json.loads(path.read_text())
    record = Record(config, files, content)
    _refuse_stale(record)
    content["versions"] = {
        name: version(name) for name in ("r1jax", "jax", "flax", "optax", "transformers")
    } | {"python": platform.python_version()}
    devices = jax.devices()
    content["hardware"] = {
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu_cores": os.cpu_count(),
        "processes": jax.process_count(),
    }
    if jax.process_index() == 0:
        plan = config.model_dump(mode="json", exclude={"output"})
        text = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True)
        write_text(files.directory / "config.yaml", text)
        record._write()
        files.push()
        wait_for_all("open_record")
    if files.copy is not None:  # process 0 must not write on while the others read
        wait_for_all("pulled")
    return record


def _refuse_stale(record: Record) -> None:
    """Raises ValueError, with each difference, where a stage that has begun was something else.

    Settings of stages to come may change, and stages may be added.
    """
    files = record.files
    for name, entry in record.content["stages"].items():
        if name not in files.stages:
            continue
        began_with = entry.get("ingredients", {})
        changed = list(differences(began_with, ingredients(record.config, name)))
        if changed:
            raise ValueError(
                f"{files.home(files.directory)}: the stage {name} is {entry['status']} with "
                f"other settings ({'; '.join(changed[:5])}). Put them back, give the new run "
                f"another name, or delete {files.home(files.stage_directory(name))} and its entry "
                "in run.json to run it anew"
            )


class Clock:
    """Seconds by phase of a stage; each `lap` books the time since the last one."""

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(spent or {})
        self._last = time.perf_counter()

    def lap(self, phase: str) -> float:
        now = time.perf_counter()
        spent = now - self._last
        self._last = now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        return spent
