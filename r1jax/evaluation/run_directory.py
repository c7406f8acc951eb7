"""Reads what a run has written so far; a run that is still going is read like a finished one.

Layout: `config.yaml` (resolved), `run.json`, and for each stage `stages/NN-<name>/` with
`metrics.jsonl`, `timings.jsonl`, `samples.jsonl`, `held_out.jsonl` (the evaluations that an RL
stage made as it trained); for evaluations and rejection sampling also `summary.json`, and for the
latter `dataset.jsonl`. All but `config.yaml` may be missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from r1jax.bucket import locate, on_bucket
from r1jax.config.lineage import Edge, edges
from r1jax.config.run_config import run_config_type

# Stages whose result is a summary; the others leave metrics and weights.
_SUMMARISED = ("evaluate", "rejection_sampling")
# Settings of a dataset that change how its problems are put, not which they are.
_WORDING = ("domain", "template", "system_prompt", "prompt_suffix")


@dataclass(frozen=True)
class StageRecord:
    """One stage of the config, and what is there of it.

    Attributes:
      machine: compilations and memory, as timings.jsonl names them, in the process that ended it.
    """

    name: str
    kind: str
    config: dict[str, Any]
    directory: Path | None
    status: str
    seconds: dict[str, float]
    summary: dict[str, Any] | None
    machine: dict[str, float] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

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
    """A run directory: the plan (`config`), the record (`info`), and its stages in order.

    Attributes:
      edges: what gives weights and data to which stage; none where the config is one that this
        version does not read (an older one's), as everything else can be read without.
    """

    directory: Path
    config: dict[str, Any]
    info: dict[str, Any]
    stages: tuple[StageRecord, ...]
    edges: tuple[Edge, ...] = ()

    def order(self) -> list[str]:
        """The names of all stages in order, with each model before the first stage that uses it."""
        stages = {stage.name for stage in self.stages}
        sources: dict[str, list[str]] = {}
        for edge in self.edges:
            sources.setdefault(edge.target, []).append(edge.source)
        names = [
            name
            for stage in self.stages
            for name in [*(s for s in sources.get(stage.name, ()) if s not in stages), stage.name]
        ]
        return list(dict.fromkeys(names))

    def weights_of(self, name: str) -> str | None:
        """The stage or model whose weights a stage starts from or evaluates, where known."""
        sources = (e.source for e in self.edges if e.target == name and e.gives == "weights")
        return next(sources, None)

    def benchmark(self, data: str) -> str:
        """The dataset with whose evaluations those on `data` compare.

        That is the first evaluated one with the same problems: a chat model and its base are asked
        the same in templates of their own.
        """
        problems = self._problems(data)
        evaluated = (str(s.config["data"]) for s in self.stages if s.kind == "evaluate")
        return next((name for name in evaluated if self._problems(name) == problems), data)

    def _problems(self, data: str) -> Any:
        """What decides which problems a dataset has; equal for equal ones."""
        section = (self.config.get("data") or {}).get(data)
        if section is None:
            return data
        if section.get("mixture"):
            return [(self._problems(part), share) for part, share in section["mixture"].items()]
        return {name: value for name, value in section.items() if name not in _WORDING}

    def model_of(self, name: str) -> str:
        """The model that a stage's weights go back to; the stage itself where nothing is known."""
        while (source := self.weights_of(name)) is not None:
            name = source
        return name

    def missing(self) -> list[str]:
        """What a finished run would have and this one has not, in words."""
        gaps = [] if self.info else ["run.json (versions, hardware, times)"]
        for stage in self.stages:
            if stage.directory is None:
                gaps.append(f"stage {stage.name} ({stage.kind}): not started")
            elif stage.kind in _SUMMARISED and stage.summary is None:
                gaps.append(f"stage {stage.name} ({stage.kind}): no summary yet")
            elif stage.status == "done" and stage.kind not in _SUMMARISED:
                if next(stage.rows("metrics.jsonl"), None) is None:
                    gaps.append(f"stage {stage.name} ({stage.kind}): no metrics")
            elif stage.status != "done":
                gaps.append(f"stage {stage.name} ({stage.kind}): {stage.status}")
        return gaps


def language_models(run_dir: str | Path) -> list[Path]:
    """The Hugging Face directories that the train stages left, in order; reward models aside."""
    found = []
    for path in sorted(locate(run_dir).glob("stages/*/model")):
        config = _json_object(path / "config.json")
        if config is None and on_bucket(path):  # it is still being written
            continue
        if not str((config or {}).get("architectures")).count("SequenceClassification"):
            found.append(path)
    return found


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
                machine={k: float(v) for k, v in (record.get("machine") or {}).items()},
            )
        )
    return Run(directory, config, info, tuple(stages), _edges(config))


def _edges(config: dict[str, Any]) -> tuple[Edge, ...]:
    try:
        return tuple(edges(run_config_type(config).model_validate(config)))
    except ValueError:
        return ()


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
