"""Searches: accuracy against generated tokens, beside votes and best of k; and a tree as drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from markupsafe import Markup, escape

from r1jax.evaluation.metrics import JsonEstimate, Summary
from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.files import JsonObject
from r1jax.report.plots import SERIES, Curve, Marker, line_plot
from r1jax.report.wording import Figure, Heading, Plot, Table, figure, plural, shortened, value_of
from r1jax.search.tree import path_of

_TREES_READ = 200  # of a stage, among which one is chosen
_ROWS = 48  # of a drawing

# Pixels of a drawing, which is as wide as a phone's screen, and drawn no wider than it.
_WIDTH, _ROW, _INDENT, _LEFT = 352, 22, 12, 10
_CHARACTER = 6.6  # of 11 pixels, in a font of one width
_FIGURES = 84  # at the right


class CostOfAccuracy(NamedTuple):
    """What further tokens bring with the same weights and problems: votes, choices, searches."""

    table: Table
    plot: Plot


class DrawnTree(NamedTuple):
    """A search's tree. steps: of the given solution, each with its value and visits."""

    stage: str
    question: str
    outcome: str
    facts: list[str]
    svg: Markup
    steps: list[tuple[str, str, str]]


class _Method(NamedTuple):
    """A way to an answer, at each number of tokens that it was measured with."""

    name: str
    note: str
    points: list[tuple[float, JsonEstimate]]


def costs_of_accuracy(run: Run) -> list[CostOfAccuracy]:
    """Of the weights and problems that a search was evaluated on."""
    groups: dict[tuple[str | None, str], list[StageRecord]] = {}
    for stage in run.evaluations():
        if stage.summary is not None:
            weights, data = run.weights_of(stage.name), run.benchmark(stage.data)
            groups.setdefault((weights, data), []).append(stage)
    costs = []
    for (weights, data), stages in groups.items():
        if any(stage.config.get("search") for stage in stages):
            methods = list(_methods(stages))
            title = f"Accuracy against generated tokens: {weights or 'weights'} on {data}"
            costs.append(CostOfAccuracy(_table(title, methods), _plot(title, methods)))
    return costs


def _methods(stages: Sequence[StageRecord]) -> Iterator[_Method]:
    searches: dict[str, list[tuple[float, JsonEstimate]]] = {}
    for stage in stages:
        summary: Summary = stage.summary or {}
        search = stage.config.get("search")
        if search:
            critic = search.get("valued_by")
            by = search.get("scored_by") or (f"the critic of {critic}" if critic else "agreement")
            name = f"{search['kind']} by {by}"
            cost = value_of(summary, "generated_tokens")
            if cost is not None and value_of(summary, "pass_at_1") is not None:
                searches.setdefault(name, []).append((cost, summary["pass_at_1"]))
            continue
        if (length := value_of(summary, "mean_length")) is None:
            continue
        first = (1, summary.get("pass_at_1"))
        votes = [first, *_by_k(summary, "cons_at_")]
        yield _method("majority vote", stage.name, votes, length)
        for chooser, figures in (summary.get("chosen_by") or {}).items():
            best = [first, *_by_k(figures, "best_of_")]
            yield _method(f"best of k by {chooser}", stage.name, best, length)
            if "weighted_vote" in figures:
                weighted = [(summary["samples"], figures["weighted_vote"])]
                yield _method(f"vote weighted by {chooser}", stage.name, weighted, length)
    for name, points in searches.items():
        yield _Method(name, "search", sorted(points, key=lambda point: point[0]))


def _by_k(figures: Summary, prefix: str) -> list[tuple[int, JsonEstimate | None]]:
    sizes = sorted(int(name.removeprefix(prefix)) for name in figures if name.startswith(prefix))
    return [(k, figures[f"{prefix}{k}"]) for k in sizes if k > 1]


def _method(
    name: str, note: str, figures: Sequence[tuple[int, JsonEstimate | None]], length: float
) -> _Method:
    """k samples cost k times the mean length."""
    known = [(k * length, each) for k, each in figures if each and each.get("value") is not None]
    return _Method(name, note, known)


def _table(title: str, methods: Sequence[_Method]) -> Table:
    rows = [
        (
            Heading(each.name, each.note),
            [Figure(f"{tokens:,.0f}"), figure(estimate, percent=True)],
        )
        for each in methods
        for tokens, estimate in each.points
    ]
    lead = "tokens per problem, k samples counted k times; of searches all branches"
    return Table(title, lead, [Heading("tokens"), Heading("right")], rows, folded=True)


def _plot(title: str, methods: Sequence[_Method]) -> Plot:
    shown = [each for each in methods if each.points][:SERIES]
    curves = [Curve.of(e.name, Marker.all_of(e.points), band=False) for e in shown]
    tokens = [step for curve in curves for step in curve.steps]
    first, last = math.log2(max(1, min(tokens))), math.log2(max(2, *tokens))
    powers = range(math.floor(first), math.ceil(last) + 1)
    ticks = [2.0**power for power in powers][:: max(1, len(powers) // 6)]
    svg = line_plot(
        curves, title=title, percent=True, x_label="tokens generated per problem", x_ticks=ticks
    )
    return Plot(title, Markup(svg), [each.name for each in shown])


def drawn_trees(run: Run) -> list[DrawnTree]:
    """Of each stage that searched, the first tree whose given solution is right, or the first."""
    drawn = []
    for stage in run.stages:
        outcomes: dict[tuple[int, int], str] = {}
        trees = list(islice(stage.rows("trees.jsonl"), _TREES_READ))
        if not trees:
            continue
        samples = stage.rows("samples.jsonl")
        for tree in trees:
            # The given solution comes first of those of its search.
            rows = list(islice(samples, len(tree["solutions"])))
            outcomes[tree["problem_id"], tree["search"]] = str(rows[0]["outcome"]) if rows else ""
        right = [t for t in trees if outcomes[t["problem_id"], t["search"]] == "right"]
        tree = (right or trees)[0]
        outcome = outcomes[tree["problem_id"], tree["search"]]
        drawn.append(_drawn(stage.name, tree, outcome))
    return drawn


def _drawn(stage: str, tree: JsonObject, outcome: str) -> DrawnTree:
    nodes, given = tree["nodes"], tree["solutions"][0]
    path = path_of(nodes, given)
    facts = [
        f"{tree['generated_tokens']:,} tokens",
        plural(len(nodes) - 1, "step"),
        plural(sum(node["state"] == "complete" for node in nodes), "completed solution"),
    ]
    kept = _kept(nodes, path)
    if len(kept) < len(nodes):
        facts.append(f"the {len(kept) - 1} most visited steps are drawn")
    steps = [(shortened(nodes[i]["text"]), _value(nodes[i]), str(nodes[i]["visits"])) for i in path]
    svg = Markup(tree_svg(nodes, kept, set(path)))
    return DrawnTree(stage, shortened(str(tree["prompt"])), outcome, facts, svg, steps)


def _kept(nodes: Sequence[JsonObject], path: Sequence[int]) -> set[int]:
    """The nodes that are drawn: those of the path, then the most visited with all above them."""
    kept = {0, *path}
    order = sorted(range(len(nodes)), key=lambda i: (-nodes[i]["visits"], -_mean(nodes[i]), i))
    for node in order:
        above = {node, *path_of(nodes, node)}
        if len(kept | above) <= _ROWS:
            kept |= above
    return kept


def _mean(node: JsonObject) -> float:
    value = node["mean_value"] if node["mean_value"] is not None else node["value"]
    return 0.0 if value is None else float(value)


def _value(node: JsonObject) -> str:
    unknown = node["mean_value"] is None and node["value"] is None
    return "–" if unknown else f"{_mean(node):.2f}"


def tree_svg(nodes: Sequence[JsonObject], kept: set[int], path: set[int]) -> str:
    """An `<svg>` element: a row for each step, indented by its depth, with its mean value and, of a
    Monte Carlo tree search, its visits.

    A circle is the fuller the higher the value; that of a completed solution has a second ring. The
    given solution is drawn in the page's accent.
    """
    children: Mapping[int, list[int]] = {i: [] for i in kept}
    for index in sorted(kept - {0}):
        children[nodes[index]["parent"]].append(index)
    order: list[tuple[int, int]] = []
    waiting = [(0, 0)]
    while waiting:
        index, depth = waiting.pop()
        order.append((index, depth))
        waiting += [(child, depth + 1) for child in reversed(children[index])]
    visited = any(node["visits"] for node in nodes)
    at = {
        index: (_LEFT + _INDENT * min(depth, 12), _ROW * row + _ROW // 2)
        for row, (index, depth) in enumerate(order)
    }
    lines, marks = list[tuple[bool, str]](), list[str]()
    for index, _ in order:
        x, y = at[index]
        node, on_path = nodes[index], index in path
        colour = "var(--accent)" if on_path or index == 0 else "var(--muted)"
        if index:
            above_x, above_y = at[node["parent"]]
            line = f'<path d="M{above_x} {above_y + 5}V{y}H{x - 5}" fill="none"'
            line += f' style="stroke:{colour};stroke-width:{2 if on_path else 1}"/>'
            lines.append((on_path, line))
        fill = f"fill:{colour};fill-opacity:{_mean(node):.2f};stroke:{colour}"
        marks.append(f'<circle cx="{x}" cy="{y}" r="4.5" style="{fill}"/>')
        if node["state"] == "complete":
            ring = f'<circle cx="{x}" cy="{y}" r="7" fill="none"'
            marks.append(f'{ring} style="stroke:{colour}"/>')
        right = f"{_value(node)} · {node['visits']}" if visited else _value(node)
        text = " ".join(str(node["text"]).split()) if index else "the question"
        room = int((_WIDTH - x - 14 - _FIGURES) / _CHARACTER)
        text = text if len(text) <= room else text[: max(1, room - 1)] + "…"
        weight = ' style="font-weight:700"' if on_path else ""
        marks.append(f'<text x="{x + 12}" y="{y + 4}"{weight}>{escape(text)}</text>')
        marks.append(f'<text x="{_WIDTH}" y="{y + 4}" text-anchor="end"{weight}>{right}</text>')
    height = _ROW * len(order)
    drawn = [line for _, line in sorted(lines, key=lambda each: each[0])]  # the path over others
    return (
        f'<svg class="tree" role="img" aria-label="The tree of a search" '
        f'viewBox="0 0 {_WIDTH} {height}">{"".join(drawn + marks)}</svg>'
    )
