"""Where a run's files are; and run.json: status and seconds of each stage, and what decided it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import jax
import yaml

from r1jax.bucket import WorkingCopy, locate, on_bucket
from r1jax.checkpoints import kept_steps
from r1jax.config.lineage import changes, edges, extension, ingredients
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

    @staticmethod
    def to_read(config: RunConfig) -> RunFiles:
        """As `of`, only to be read: those of a run on a bucket are read there, without a copy."""
        home = locate(config.output) / f"{config.name}-s{config.seed}"
        return RunFiles(home, tuple(stage.name for stage in config.stages))

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

    def newest_checkpoint(self, stage: str) -> int:
        """The step that a train stage goes on from; 0: from its start."""
        steps = kept_steps(self.home(self.stage_directory(stage)) / "checkpoints")
        return steps[-1] if steps else 0

    def remove_stage(self, name: str) -> None:
        """Removes all that a stage has written."""
        directory = self.stage_directory(name)
        home = self.home(directory)
        if home != directory and home.exists():
            home.rmtree()  # type: ignore[attr-defined]  # of a path on a bucket
        shutil.rmtree(directory, ignore_errors=True)

    def trained(self, stage: str) -> Path:
        """The Hugging Face directory that a train stage leaves."""
        return self.home(self.stage_directory(stage) / "model")

    def trained_critic(self, stage: str) -> Path:
        """The Hugging Face directory of its critic, where a train stage has one."""
        return self.home(self.stage_directory(stage) / "critic")


@dataclass(frozen=True)
class Record:
    """The record of a run; process 0 writes it, all processes keep the same one.

    forgotten: stages that run from their start, though something of them may lie there.
    """

    config: RunConfig
    files: RunFiles
    content: JsonObject
    forgotten: list[str] = field(default_factory=list)

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

    def note_references(self, lines: Sequence[str]) -> None:
        """Note what was said of reference answers that cannot be read, for the report."""
        self.content["references"] = list(lines)
        self._write()

    def status(self, name: str) -> str | None:
        """`running`, `done`, or None for a stage that has not begun."""
        status: str | None = self.content["stages"].get(name, {}).get("status")
        return status

    def seconds(self, name: str) -> dict[str, float]:
        """Seconds by phase that a stage has taken so far."""
        return dict(self.content["stages"].get(name, {}).get("seconds", {}))

    def _write(self) -> None:
        self.content["saved"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if jax.process_index() == 0:
            text = json.dumps(self.content, indent=2) + "\n"
            write_text(self.files.directory / "run.json", text)


def read_record(config: RunConfig, files: RunFiles, restart: Sequence[str] = ()) -> Record:
    """The record that a run would go on with; nothing is written.

    Raises:
      ValueError: a stage that has begun is no longer what the config says, or rests on one in
        `restart`; the message names all such stages.
    """
    path = files.directory / "run.json"
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    content: JsonObject = {"name": config.name, "seed": config.seed, "started": started}
    content["stages"] = {}
    if path.exists():
        content = _read_content(path)
    record = Record(config, files, content)
    _go_on(record, restart)
    return record


def open_record(config: RunConfig, files: RunFiles, restart: Sequence[str] = ()) -> Record:
    """Create the run's directory, or continue in it if its results are still the config's.

    Process 0 writes; the others wait and read the same files. What the stages in `restart` have
    written is removed.

    Raises ValueError as `read_record`.
    """
    if jax.process_index() > 0:
        wait_for_all("open_record")
    files.pull()
    files.directory.mkdir(parents=True, exist_ok=True)
    record = read_record(config, files, restart)
    content = record.content
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
        for name in record.forgotten:
            files.remove_stage(name)
        plan = config.model_dump(mode="json", exclude={"output"})
        text = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True)
        write_text(files.directory / "config.yaml", text)
        record._write()
        files.push()
        wait_for_all("open_record")
    if files.copy is not None:  # process 0 must not write on while the others read
        wait_for_all("pulled")
    return record


def _read_content(path: Path) -> JsonObject:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
            raise ValueError("no table of stages")
    except ValueError as error:
        raise ValueError(
            f"{path}: not the record of a run ({error}); put it back from a copy, or give the new "
            "run another name"
        ) from None
    return content


def _go_on(record: Record, restart: Sequence[str]) -> None:
    """Forgets the stages in `restart`, and takes those that get longer as running.

    Settings of stages to come may change, and stages may be added. A stage that saved nothing is to
    come; a train stage may get longer, and then goes on.

    Raises ValueError, with each difference, where another stage that has begun was something else,
    or rests on one in `restart`.
    """
    config, files, begun = record.config, record.files, record.content["stages"]
    for name in restart:
        begun.pop(name, None)
        record.forgotten.append(name)
    stale: dict[str, list[str]] = {}
    for name, entry in list(begun.items()):
        if name not in files.stages:
            continue
        began_with = entry.get("ingredients", {})
        changed = changes(began_with, config, name)
        if not changed:
            continue
        if entry["status"] != "done" and not _has_saved(record, name):
            del begun[name]
            record.forgotten.append(name)
        elif extension(began_with, config, name) and _gets_longer(record, name, began_with):
            entry["status"] = "running"
        else:
            stale[name] = changed
    again = _resting_on({*stale, *restart}, record)
    options = " ".join(f"--restart {n}" for n in files.stages if n in {*again, *stale, *restart})
    if stale:
        lines = list(dict.fromkeys(line for changed in stale.values() for line in changed))
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        states = _states(record, [name for name in files.stages if name in stale])
        those = "the stage" if len({*again, *stale}) == 1 else "these stages"
        raise ValueError(
            f"{files.home(files.directory)}: {states} with other settings "
            f"({'; '.join(lines[:5])}{more}). Put them back, give the new run another name, or run "
            f"{those} anew: the same command with {options}"
        )
    if again:
        one, it = len(again) == 1, "it" if len(restart) == 1 else "them"
        raise ValueError(
            f"--restart {' --restart '.join(restart)}: {_listed(again)}, which "
            f"{'has begun, rests' if one else 'have begun, rest'} on {it}; give the same command "
            f"with {options}, or another name to the new run"
        )


def _resting_on(names: Set[str], record: Record) -> list[str]:
    """The stages, other than `names`, that have begun and rest on one of them, in their order."""
    found: list[str] = []
    for edge in edges(record.config):  # in the order of the stages: a source comes first
        if edge.source in {*names, *found} and edge.target not in {*names, *found}:
            if edge.target in record.content["stages"]:
                found.append(edge.target)
    return found


def _states(record: Record, names: Sequence[str]) -> str:
    """`the stages a and b are finished, and the stage c was begun`"""
    done = [name for name in names if record.status(name) == "done"]
    groups = [(done, "is finished", "are finished")]
    groups.append(([name for name in names if name not in done], "was begun", "were begun"))
    return ", and ".join(
        f"the stage {each[0]} {one}" if len(each) == 1 else f"the stages {_listed(each)} {many}"
        for each, one, many in groups
        if each
    )


def _listed(names: Sequence[str]) -> str:
    """`a, b and c`"""
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def _has_saved(record: Record, name: str) -> bool:
    """Whether a stage left something to go on from: a checkpoint; of one without, any file."""
    if record.config.stage(name).DESCRIPTION.trains:
        return record.files.newest_checkpoint(name) > 0
    paths = record.files.stage_directory(name).rglob("*")
    return any(path.is_file() and path.stat().st_size for path in paths)


def _gets_longer(record: Record, name: str, began_with: JsonObject) -> bool:
    """Whether a train stage is to take steps beyond those that are done."""
    stage, before = record.config.stage(name), began_with[f"stages.{name}"]
    if (steps := stage.planned_steps()) is not None:
        newest = record.files.newest_checkpoint(name)
        if record.status(name) == "done":
            return newest > 0 and steps > before["steps"]
        return steps >= newest
    return float(getattr(stage, "epochs", 0.0)) > float(before["epochs"])


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
