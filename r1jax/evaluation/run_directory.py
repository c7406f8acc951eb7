"""Reads what a run has written so far; a run that is still going is read like a finished one.

Layout: `config.yaml` (resolved), `run.json`, and for each stage `stages/NN-<name>/` with
`metrics.jsonl`, `timings.jsonl`, `samples.jsonl`, `held_out.jsonl` (evaluations made during RL);
of an evaluation or a dataset also `summary.json`, and of the latter `dataset.jsonl`. All but
`config.yaml` may be missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from r1jax.bucket import locate, on_bucket
from r1jax.config.lineage import Edge, edges
from r1jax.config.run_config import RunConfig
from r1jax.files import JsonObject, read_rows
from r1jax.lock import LOCK, is_locked
from r1jax.settings.kinds import describe_kind
from r1jax.settings.stage import StageDescription

# Settings of a dataset that change how its problems are put, not which they are.
_WORDING = ("domain", "template", "system_prompt", "prompt_prefix", "prompt_suffix")


@dataclass(frozen=True)
class StageRecord:
    """One stage of the config, and what it has written.

    description: what the kind says of itself; of one that cannot be imported, only its name.
    seconds: by phase. machine: compilations and memory, named as in timings.jsonl.
    """

    name: str
    kind: str
    description: StageDescription
    config: JsonObject
    directory: Path | None
    status: str
    seconds: Mapping[str, float]
    summary: JsonObject | None
    machine: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    @property
    def is_evaluation(self) -> bool:
        return self.description.leaves == "evaluation"

    @property
    def learns(self) -> bool:
        """Whether its weights are another language model than the base: pretraining makes that."""
        return self.description.leaves == "weights" and not self.description.makes_base

    @property
    def gap(self) -> str:
        """What it has not, in words, that a finished one has."""
        trains = self.description.trains
        if self.directory is None:
            return "not started"
        if not trains and self.summary is None:
            return "no summary yet"
        if self.status != "done":
            return self.status
        return "no metrics" if trains and next(self.rows("metrics.jsonl"), None) is None else ""

    @property
    def data(self) -> str:
        """The dataset of an evaluation; one whose settings have none stands for itself."""
        data = self.config.get("data")
        return data if isinstance(data, str) else self.name

    def rows(self, file: str) -> Iterator[JsonObject]:
        """Rows of a JSON-lines file, one at a time; none where the file does not exist."""
        if self.directory is not None and (self.directory / file).is_file():
            yield from read_rows(self.directory / file)

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

    edges: what gives weights and data to which stage; none where the config is of a version that
        this one does not read.
    """

    directory: Path
    config: JsonObject
    info: JsonObject
    stages: tuple[StageRecord, ...]
    edges: tuple[Edge, ...] = ()

    @property
    def title(self) -> str:
        return str(self.config.get("title") or self.config.get("name"))

    def order(self) -> list[str]:
        """The names of all stages in order, with each model before the first stage that uses it."""
        stages = {stage.name for stage in self.stages}
        sources: dict[str, list[str]] = {}
        for edge in self.edges:
            sources.setdefault(edge.target, []).append(edge.source)
        names: list[str] = []
        for stage in self.stages:
            names += [s for s in sources.get(stage.name, ()) if s not in stages] + [stage.name]
        return list(dict.fromkeys(names))

    def evaluations(self) -> list[StageRecord]:
        """The stages that leave an evaluation, finished or not."""
        return [stage for stage in self.stages if stage.is_evaluation]

    def weights_of(self, name: str) -> str | None:
        """The stage or model whose weights a stage starts from or evaluates, where known."""
        sources = (e.source for e in self.edges if e.target == name and e.gives == "weights")
        return next(sources, None)

    def template_of(self, stage: StageRecord) -> str | None:
        """The template of a stage's prompts; None where its datasets have several, or none is
        known."""
        data = stage.config.get("data")
        names = [data] if isinstance(data, str) else [each.get("data") for each in data or []]
        sections = self.config.get("data") or {}
        parts = [p for n in names for p in ((sections.get(n) or {}).get("mixture") or [n])]
        templates = {(sections.get(part) or {}).get("template") for part in parts}
        return templates.pop() if len(templates) == 1 else None

    def benchmark(self, data: str) -> str:
        """The first dataset with the same problems as `data`, whose evaluations compare with its.

        A chat model and its base get the same problems in different templates.
        """
        problems = self._problems(data)
        evaluated = (stage.data for stage in self.evaluations())
        return next((name for name in evaluated if self._problems(name) == problems), data)

    def _problems(self, data: str) -> object:
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
        named = [(f"stage {stage.name} ({stage.kind})", stage.gap) for stage in self.stages]
        return gaps + [f"{name}: {gap}" for name, gap in named if gap]


def split_reference(name: str) -> tuple[Path | None, str | None]:
    """The run's directory and the checkpoint (None: not named) of RUN_DIR, RUN_DIR@STEP or
    RUN_DIR@STAGE:STEP; (None, None) for anything else, such as a Hugging Face directory."""
    for directory, at, checkpoint in ((name, "", ""), name.rpartition("@")):
        if directory and (locate(directory) / "config.yaml").is_file():
            return locate(directory), checkpoint if at else None
    return None, None


def language_models(run_dir: str | Path) -> list[Path]:
    """The Hugging Face directories that the train stages left, in order; reward models aside."""
    models = []
    for path in sorted(locate(run_dir).glob("stages/*/model")):
        config = _json_object(path / "config.json")
        if config is None and on_bucket(path):  # it is still being written
            continue
        # Of sequences or of tokens.
        if not str((config or {}).get("architectures")).count("Classification"):
            models.append(path)
    return models


def read_run(run_dir: str | Path) -> Run:
    """Reads a run directory.

    Raises FileNotFoundError without a `config.yaml`, ValueError for a damaged file (with its line).
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
    records = info.get("stages") or {}
    # Directories are `NN-<name>`, and names are unique in a config.
    paths = {path.name.partition("-")[2]: path for path in sorted(directory.glob("stages/*-*/"))}
    # `running` is recorded while it is true, and stays when the process dies. In a copy of a
    # directory, such as one of a bucket, nobody holds a lock.
    begun = "running" if is_locked(directory) else "stopped"
    if info.get("saved") and not (directory / LOCK).exists():
        begun = f"running when last saved, {info['saved']}"
    stages = []
    for plan in config["stages"]:
        path, record = paths.get(plan["name"]), records.get(plan["name"]) or {}
        status = record.get("status", "not started" if path is None else "running")
        stages.append(
            StageRecord(
                name=plan["name"],
                kind=plan["kind"],
                description=describe_kind(plan["kind"]),
                config=plan,
                directory=path,
                status=begun if status == "running" else status,
                seconds={k: float(v) for k, v in (record.get("seconds") or {}).items()},
                summary=None if path is None else _json_object(path / "summary.json"),
                machine={k: float(v) for k, v in (record.get("machine") or {}).items()},
            )
        )
    try:
        known = tuple(edges(RunConfig.model_validate(config)))
    except ValueError:  # of another version, or with a kind that cannot be imported
        known = ()
    return Run(directory, config, info, tuple(stages), known)


def _json_object(path: Path) -> JsonObject | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _number(raw: object) -> float | None:
    """A finite number, or None; recorded nan and inf are the strings "nan" and "inf"."""
    if isinstance(raw, bool) or not isinstance(raw, (int, float)):
        return None
    return float(raw) if math.isfinite(raw) else None
