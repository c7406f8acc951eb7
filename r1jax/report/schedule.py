"""The run's stages as a graph, each with its cost and its result.

Drawn like a version history: one row per model and stage in their order, edges as lines in a gutter
at the left. Rows are text that wraps; lines are boxes with borders, which grow with their rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from r1jax.config.lineage import Edge
from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.plots import short
from r1jax.report.wording import Figure, duration, figure
from r1jax.settings.model import MODEL

_PHASES = ("rollout", "score_wait", "update", "compile", "checkpoint")
_BARS = 6  # phases with a colour of their own in the bars; the others share one
_COLOURS = 4  # of the page's series, for the lines that bend; the fifth is a grey

# Pixels: between lanes, of the first port (where a line meets a mark), between ports, of a mark.
LANE, _PORT, _PITCH, _MARK = 13, 17, 8, 10


class _Rail(NamedTuple):
    """One line from a row to one or more rows below it; lane 0 runs from mark to mark."""

    source: int
    targets: tuple[int, ...]
    lane: int
    gives: str

    @property
    def rows(self) -> range:
        return range(self.source, self.targets[-1] + 1)


def _rails(order: Sequence[str], edges: Sequence[Edge]) -> list[_Rail]:
    """Lines for all edges between the rows `order`, such that no two share a lane of a row.

    An edge to the next row is a straight line between the two marks. A source's other edges share
    one line for weights, one for data, and so on.
    """
    row = {name: i for i, name in enumerate(order)}
    wanted: dict[tuple[int, str], list[int]] = {}
    for edge in edges:
        if edge.source in row and edge.target in row:
            wanted.setdefault((row[edge.source], edge.gives), []).append(row[edge.target])
    straight: dict[int, _Rail] = {}
    bent: list[_Rail] = []
    # Short lines first: they lie nearest to the marks.
    for source, gives in sorted(wanted, key=lambda key: (max(wanted[key]) - key[0], key)):
        targets = sorted(set(wanted[source, gives]))
        if targets[0] == source + 1 and source not in straight:
            straight[source] = _Rail(source, (targets.pop(0),), 0, gives)
        if targets:
            rail = _Rail(source, tuple(targets), 0, gives)
            taken = {other.lane for other in bent if {*rail.rows} & {*other.rows}}
            bent.append(rail._replace(lane=min({*range(1, len(bent) + 2)} - taken)))
    return [*straight.values(), *bent]


class _Piece(NamedTuple):
    """The part of a line within one row, in pixels of the row; `height` None: to its end.

    shape: `line` is vertical, `arrives` bends into the mark, `leaves` bends out of it.
    """

    shape: str
    left: int
    top: int
    width: int
    height: int | None
    colour: int
    gives: str


class _Drawing(NamedTuple):
    """The gutter of one row: its lines, and the height of its mark."""

    pieces: list[_Piece]
    mark: int


def _draw(count: int, lines: Sequence[_Rail]) -> tuple[list[_Drawing], int]:
    """What to draw beside each of `count` rows, and the marks' distance from the left (pixels)."""
    lanes = max((rail.lane for rail in lines), default=0)
    centre = lanes * LANE + _MARK // 2
    bent = sorted({rail.source for rail in lines if rail.lane})
    colours = {source: i % _COLOURS + 1 for i, source in enumerate(bent)}
    drawings = []
    for row in range(count):
        here = [rail for rail in lines if row in rail.rows]
        side = [rail for rail in here if rail.lane]
        # In this order of ports no line crosses another that ends or begins in the same row.
        arriving = sorted((r for r in side if row in r.targets), key=lambda rail: rail.lane)
        leaving = sorted((r for r in side if r.source == row), key=lambda rail: -rail.lane)
        port = {id(r): _PORT + i * _PITCH for i, r in enumerate([*arriving, *leaving])}
        mark = _MARK + _PITCH * max(0, len(port) - 1)
        top, bottom = _PORT - _MARK // 2, _PORT - _MARK // 2 + mark
        pieces = []
        for rail in here:
            x = centre - rail.lane * LANE
            if not rail.lane:
                start, end = (bottom, None) if rail.source == row else (0, top)
                pieces.append(_Piece("line", x, start, 0, end, _COLOURS + 1, rail.gives))
                continue
            look = (colours[rail.source], rail.gives)
            if rail.source < row < rail.targets[-1]:
                pieces.append(_Piece("line", x, 0, 0, None, *look))
            if row in rail.targets:
                pieces.append(_Piece("arrives", x, 0, centre - x, port[id(rail)], *look))
            if row == rail.source:
                pieces.append(_Piece("leaves", x, port[id(rail)], centre - x, None, *look))
        drawings.append(_Drawing(pieces, mark))
    return drawings, centre


@dataclass
class _Node:
    """A row of the graph: a model or a stage, and the evaluations of its weights.

    kind: `model`, or the title of the stage's kind. origins: (what, from where) it is given.
    widths: of the phases, in per cent of the bar. evaluations: with pass@1 and cost.
    """

    name: str
    kind: str
    facts: list[str]
    origins: list[tuple[str, str]] = field(default_factory=list)
    status: str = "done"
    cost: str = ""
    share: str = ""
    widths: list[float] = field(default_factory=list)
    evaluations: list[tuple[StageRecord, Figure, str]] = field(default_factory=list)
    drawing: _Drawing = _Drawing([], _MARK)


class _Schedule(NamedTuple):
    """The graph of a run for the template, with a table of seconds by stage and phase.

    centre, gutter: of the marks, and the gutter's width, in pixels from the left. gives: what edges
        stand for, each once; known: whether they are. bars, phases: in the bars and in the table.
    table: the cells of each stage: status, the phases, all of them, speeds, compilations, memory.
    """

    nodes: list[_Node]
    centre: int
    gutter: int
    gives: list[str]
    known: bool
    bars: list[str]
    phases: list[str]
    table: list[tuple[str, list[str]]]
    total: str


def schedule(run: Run) -> _Schedule:
    nodes = _nodes(run)
    lines = _rails(list(nodes), run.edges)
    drawings, centre = _draw(len(nodes), lines)
    for node, drawing in zip(nodes.values(), drawings, strict=True):
        node.drawing = drawing
    phases = _phases(run.stages)
    return _Schedule(
        nodes=list(nodes.values()),
        centre=centre,
        gutter=centre + _MARK // 2 + 12,
        gives=list(dict.fromkeys(rail.gives for rail in lines)),
        known=bool(run.edges),
        bars=[name.replace("_", " ") for name in _bars(run)],
        phases=[phase.replace("_", " ") for phase in phases],
        table=[(stage.name, _cells(stage, phases)) for stage in run.stages],
        total=duration(sum(stage.total_seconds for stage in run.stages)),
    )


def _nodes(run: Run) -> dict[str, _Node]:
    # Stages as in the config, each model before the first stage that uses it.
    total = sum(stage.total_seconds for stage in run.stages)
    longest = max((s.total_seconds for s in run.stages if not _is_line(run, s)), default=0.0)
    bars = _bars(run)
    stages = {stage.name: stage for stage in run.stages}
    nodes: dict[str, _Node] = {}
    for name in run.order():
        if name not in stages:
            nodes[name] = _Node(name, "model", _model_facts(run, name))
            continue
        stage = stages[name]
        weights = run.weights_of(name)
        cost = duration(stage.total_seconds) if stage.seconds else ""
        if weights is not None and _is_line(run, stage):
            share = figure((stage.summary or {}).get("pass_at_1"), percent=True)
            nodes[weights].evaluations.append((stage, share, cost))
            continue
        nodes[name] = _Node(
            name,
            stage.description.title,
            _facts(stage),
            [(edge.gives, edge.source) for edge in run.edges if edge.target == name],
            stage.status,
            cost,
            f"{100 * stage.total_seconds / total:.0f} %" if stage.seconds and total else "",
            [
                100 * sum(stage.seconds.get(phase, 0.0) for phase in phases) / longest
                for phases in (bars.values() if longest else ())
            ],
        )
    return nodes


def _model_facts(run: Run, name: str) -> list[str]:
    section = run.config.get("model") if name == MODEL else (run.config.get("models") or {})[name]
    if not isinstance(section, Mapping):
        return []
    if section.get("path"):
        return [str(section["path"])]
    kind = (section.get("config") or {}).get("model_type", "")
    return [f"{kind}, random weights".removeprefix(", ")]


def _facts(stage: StageRecord) -> list[str]:
    """How long the stage is, and of a dataset how many samples were kept."""
    facts = []
    for unit in ("steps", "epochs"):
        amount = stage.config.get(unit)
        if isinstance(amount, int | float):
            facts.append(f"{amount:,} {unit}".replace(".0 ", " "))
    counts = (stage.summary or {}).get("samples")
    if isinstance(counts, Mapping):
        facts.append(f"{counts.get('kept', 0):,} of {sum(counts.values()):,} samples kept")
    return facts


def _is_line(run: Run, stage: StageRecord) -> bool:
    # An evaluation of known weights is a line in their row.
    return stage.is_evaluation and run.weights_of(stage.name) is not None


def _phases(stages: Sequence[StageRecord]) -> list[str]:
    every = {phase for stage in stages for phase in stage.seconds}
    return [phase for phase in _PHASES if phase in every] + sorted(every - {*_PHASES})


def _bars(run: Run) -> dict[str, list[str]]:
    """Name of a part of the bars -> its phases: the longest ones in order, then the rest as one."""
    stages = [stage for stage in run.stages if not _is_line(run, stage)]
    phases = _phases(stages)
    spent = {phase: sum(s.seconds.get(phase, 0.0) for s in stages) for phase in phases}
    # Where only one is left over, it needs no other name.
    several = len(phases) > _BARS + 1
    longest = sorted(phases, key=lambda phase: -spent[phase])[:_BARS] if several else phases
    bars = {phase: [phase] for phase in phases if phase in longest}
    rest = [phase for phase in phases if phase not in longest]
    return bars | ({"other": rest} if rest else {})


def _cells(stage: StageRecord, phases: Sequence[str]) -> list[str]:
    timings = stage.columns("timings.jsonl")
    speeds = (timings.get(f"tokens_per_second/{phase}") for phase in ("rollout", "update"))
    return [
        stage.status,
        *(duration(stage.seconds[p]) if p in stage.seconds else "–" for p in phases),
        duration(stage.total_seconds) if stage.seconds else "–",
        *("–" if speed is None else short(median(speed[1])) for speed in speeds),
        _compiled(stage.machine),
        _memory(stage.machine),
    ]


def _compiled(machine: Mapping[str, float]) -> str:
    if "compile_count" not in machine:
        return "–"
    hits, misses = machine.get("cache_hits", 0), machine.get("cache_misses", 0)
    cached = f", {hits:.0f} cached" if hits + misses else ""
    return f"{machine['compile_count']:.0f} in {duration(machine['compile_seconds'])}{cached}"


def _memory(machine: Mapping[str, float]) -> str:
    if "memory_peak_bytes" not in machine:
        return "–"
    limit = machine.get("memory_limit_bytes")
    of_limit = f" of {limit / 2**30:.3g}" if limit else ""
    return f"{machine['memory_peak_bytes'] / 2**30:.3g}{of_limit} GiB"
