"""Reads what a run has written so far; a run that is still going is read like a finished one.

Layout: `config.yaml` (resolved), `run.json`, and for each stage `stages/NN-<name>/` with
`metrics.jsonl`, `timings.jsonl`, `samples.jsonl` and, for evaluations, `summary.json`. All but
`config.yaml` may be missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class StageRecord:
    """One stage of the config, and what is there of it."""

    name: str
    kind: str
    config: dict[str, Any]
    directory: Path | None
    status: str
    seconds: dict[str, float]
    summary: dict[str, Any] | None

    def rows(self, file: str) -> Iterator[dict[str, Any]]:
        """Rows of a JSON-lines file, one at a time; none where the file does not exist."""
        if self.directory is not None:
            yield from _json_lines(self.directory / file)

    def columns(self, file: str) -> dict[str, tuple[list[float], list[float]]]:
        """Numbers of a JSON-lines file: name -> (steps, values), without values not finite."""
        columns: dict[str, tuple[list[float], list[float]]] = {}
        for row in self.rows(file):
            step = _number(row.get("step"))
            for name, raw in row.items():
                value = _number(raw)
                if name == "step" or value is None or step is None:
                    continue
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
        return columns


@dataclass(frozen=True)
class Run:
    """A run directory: the plan (`config`), the record (`info`), and its stages in order."""

    directory: Path
    config: dict[str, Any]
    info: dict[str, Any]
    stages: tuple[StageRecord, ...]

    def missing(self) -> list[str]:
        """What a finished run would have and this one has not, in words."""
        gaps = [] if self.info else ["run.json (versions, hardware, times)"]
        for stage in self.stages:
            if stage.directory is None:
                gaps.append(f"stage {stage.name} ({stage.kind}): not started")
            elif stage.kind == "evaluate" and stage.summary is None:
                gaps.append(f"stage {stage.name} (evaluate): no summary yet")
            elif stage.status == "done" and stage.kind != "evaluate":
                if next(stage.rows("metrics.jsonl"), None) is None:
                    gaps.append(f"stage {stage.name} ({stage.kind}): no metrics")
            elif stage.status != "done":
                gaps.append(f"stage {stage.name} ({stage.kind}): {stage.status}")
        return gaps


def read_run(run_dir: str | Path) -> Run:
    """Reads a run directory.

    Raises:
      FileNotFoundError: there is no `config.yaml`: not the directory of a run.
      ValueError: a file is not what it should be; names file and line.
    """
    directory = Path(run_dir)
    config_path = directory / "config.yaml"
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{config_path} does not exist: give the directory of a run, such as runs/NAME-s0"
        )
    config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not isinstance(config.get("stages"), list):
        raise ValueError(f"{config_path}: not the resolved config of a run (no list of stages)")
    info = _json_object(directory / "run.json") or {}
    recorded = info.get("stages") or {}
    # Directories are `NN-<name>`, and names are unique in a config.
    found = {path.name.partition("-")[2]: path for path in sorted(directory.glob("stages/*-*/"))}
    stages = []
    for plan in config["stages"]:
        name = plan["name"]
        path, record = found.get(name), recorded.get(name) or {}
        stages.append(
            StageRecord(
                name=name,
                kind=plan["kind"],
                config=plan,
                directory=path,
                status=record.get("status", "not started" if path is None else "running"),
                seconds={k: float(v) for k, v in (record.get("seconds") or {}).items()},
                summary=None if path is None else _json_object(path / "summary.json"),
            )
        )
    return Run(directory, config, info, tuple(stages))


def _json_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            # A last line without its newline is still being written.
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object")
            yield row


def _number(raw: Any) -> float | None:
    """A finite number, or None; recorded nan and inf are the strings "nan" and "inf"."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return None
    return float(raw) if math.isfinite(raw) else None
