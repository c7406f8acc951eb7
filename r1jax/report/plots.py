"""Small plots as inline SVG that take their colours from the page.

Matplotlib draws in placeholder colours; in the SVG they become CSS variables, so one plot serves
light and dark mode. Text stays text: it is searchable and uses the page's font.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from r1jax.evaluation.metrics import Floats, JsonEstimate

Look = dict[str, Any]  # named options of a drawing method
# Placeholder colour -> CSS. Series first, in the order in which they are handed out.
_SERIES = ("#010101", "#020202", "#030303", "#040404", "#050505", "#060606", "#070707")
_INK, _RULE = "#080808", "#090909"
SERIES = len(_SERIES)
"""Curves that a plot can tell apart."""
_CSS = {colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)} | {
    _INK: "var(--muted)",
    _RULE: "var(--rule)",
}
# Inches. A plot is shown about 300 pixels wide, on a phone too: text of 9 points becomes 11 pixels.
_SIZE = (3.4, 1.95)
_SMOOTH_FROM = 40  # points from which on a curve is drawn smoothed, over its raw values


class Curve(NamedTuple):
    """One line: name, steps and finite values; low, high: its band at each step, if any."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()

    @classmethod
    def of(cls, name: str, markers: Sequence[Marker], *, band: bool = True) -> Curve:
        """A line through figures, with their intervals as its band."""
        steps, values = [m.step for m in markers], [m.value for m in markers]
        ends = ([m.low for m in markers], [m.high for m in markers]) if band else ((), ())
        return cls(name, steps, values, *ends)


class Marker(NamedTuple):
    """A measured figure with its interval, drawn at a step."""

    step: float
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, step: float, estimate: JsonEstimate | None) -> Marker | None:
        """A figure of a summary; an unknown end of the interval is the value."""
        value = (estimate or {}).get("value")
        if estimate is None or value is None:
            return None
        ends = (estimate.get(end) for end in ("low", "high"))
        return cls(step, float(value), *(float(value if end is None else end) for end in ends))

    @classmethod
    def all_of(cls, figures: Iterable[tuple[float, JsonEstimate | None]]) -> list[Marker]:
        """Those of (step, figure) that are known."""
        return [m for step, estimate in figures if (m := cls.of(step, estimate)) is not None]


class _Point(NamedTuple):
    """A point that shows its value under the pointer; `series` counts from 1."""

    series: int
    x: float
    y: float
    name: str
    value: str


class Dots(NamedTuple):
    """Figures of one kind: a marker's `step` is the index of its row.

    seeds: of single seeds, of which `markers` are the means; drawn pale and without intervals.
    """

    name: str
    markers: Sequence[Marker]
    seeds: Sequence[Marker] = ()


def _smooth(values: Sequence[float] | Floats) -> Floats:
    """Centred moving average over about a twentieth of the curve; at the ends over half of that."""
    # Windows that shrink to one point at the ends would turn the last step's noise into a trend.
    x = np.asarray(values, dtype=np.float64)
    half = max(1, len(x) // 40)
    sums = np.concatenate([[0.0], np.cumsum(x)])
    at = np.arange(len(x))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(x))
    return (sums[last] - sums[first]) / (last - first)


def line_plot(
    curves: Sequence[Curve],
    *,
    title: str,
    percent: bool = False,
    log: bool = False,
    x_label: str = "step",
    x_ticks: Sequence[float] | None = None,
    markers: Sequence[Marker] = (),
) -> str:
    """An `<svg>` element; colour i of the page's `--series-i` goes to curve i (at most `SERIES`).

    Args:
      curves: those without points are left out. Long ones are smoothed, unless they have a band.
      title: read out by screen readers; the page shows its own heading.
      percent: values are shares. log: logarithmic values, where all are positive.
      x_ticks: the steps are categories on a doubling scale, such as sizes of a vote.
      markers: figures with intervals, in the colour of the first curve.
    """
    with _figure(title, _SIZE) as (figure, axes, out):
        values = [v for curve in curves for v in (*curve.values, *curve.low, *curve.high)]
        for colour, curve in zip(_SERIES, curves, strict=False):
            if not len(curve.values):
                continue
            smoothed = len(curve.values) >= _SMOOTH_FROM and not curve.low
            if curve.low:
                axes.fill_between(
                    curve.steps, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0
                )
            if smoothed:
                axes.plot(curve.steps, curve.values, color=colour, linewidth=0.8, alpha=0.28)
            _line(axes, curve.steps, _smooth(curve.values) if smoothed else curve.values, colour)
        look: Look = {"color": _SERIES[0], "marker": "D", "markersize": 5, "clip_on": False}
        for m in markers:
            axes.errorbar([m.step], [m.value], yerr=_arms(m), capsize=3, linewidth=1.2, **look)
        if log and values and min(values) > 0:
            axes.set_yscale("log")
            _decades(axes, min(values), max(values))
        elif percent:
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=_ROUND))
            axes.yaxis.set_major_formatter(_PERCENT)
            shown = values + [m.high for m in markers] + [m.low for m in markers]
            if shown and min(shown) >= 0 and max(shown) > 0.5:
                axes.set_ylim(0, 1.02)
            elif shown and min(shown) == max(shown) == 0:
                axes.set_ylim(0, 0.05)  # no share is negative
        else:
            if values and min(values) == max(values):  # zoomed into, all ticks read the same
                axes.set_ylim(*sorted((0, 2 * values[0] or 1)))
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=_ROUND))
            axes.yaxis.set_major_formatter(_SHORT)
        if x_ticks:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(x_ticks), [f"{x:g}" for x in x_ticks])
            axes.minorticks_off()
        else:
            _steps(axes, [step for curve in curves for step in curve.steps])
        _frame(figure, axes, x_label)
        points = [
            _Point(i, step, value, curve.name, _shown(value, percent, low, high))
            for i, curve in enumerate(curves, 1)
            for step, value, low, high in _with_band(curve)
        ]
        points += [
            _Point(1, m.step, m.value, "held-out", _shown(m.value, percent, m.low, m.high))
            for m in markers
        ]
        pointed = _under_pointer(figure, axes, points, {p.x: f"{x_label} {p.x:g}" for p in points})
    return _inline(out.getvalue(), title, pointed)


def dot_plot(
    labels: Sequence[str], series: Sequence[Dots], *, title: str, percent: bool = False
) -> str:
    """An `<svg>` element: a row for each label, in it a point with its interval for each series.

    Args:
      labels: names of the rows, from the top; long ones are cut.
      series: at most `SERIES`, with the page's colours in order.
    """
    shown = [label if len(label) <= 16 else f"{label[:15]}…" for label in labels]
    # Inches; the rows have the same height whatever their number.
    width, below, above = _SIZE[0], 0.3, 0.06
    height = 0.27 * len(labels) + below + above
    with _figure(title, (width, height)) as (figure, axes, out):
        for i, (colour, dots) in enumerate(zip(_SERIES, series, strict=False)):
            offset = 0.3 * (i - (len(series) - 1) / 2)
            pale: Look = {"markersize": 6, "markeredgewidth": 0, "alpha": 0.35, "linestyle": ""}
            rows = [m.step + offset for m in dots.seeds]
            axes.plot([m.value for m in dots.seeds], rows, color=colour, marker="o", **pale)
            look: Look = {"color": colour, "marker": "os^DvPX"[i], "markersize": 4.5}
            for m in dots.markers:
                axes.errorbar([m.value], [m.step + offset], xerr=_arms(m), linewidth=1.4, **look)
        axes.set_ylim(len(labels) - 0.45, -0.55)
        axes.set_yticks(range(len(labels)), shown)
        for text in axes.get_yticklabels():
            text.set_parse_math(False)  # a dollar in a name is no formula
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=_ROUND))
        axes.xaxis.set_major_formatter(_PERCENT if percent else _SHORT)
        axes.grid(axis="both", color=_RULE, linewidth=0.7)
        # A character of 9 points is at most 0.08 inches wide.
        left = min(0.45, (0.15 + 0.078 * max(map(len, shown))) / width)
        top, bottom = 1 - above / height, below / height
        figure.subplots_adjust(left=left, right=0.955, top=top, bottom=bottom)
        points = [
            _Point(i, m.value, m.step, dots.name, _shown(m.value, percent, m.low, m.high))
            for i, dots in enumerate(series, 1)
            for m in dots.markers
        ]
        titles = {float(row): str(label) for row, label in enumerate(labels)}
        pointed = _under_pointer(figure, axes, points, titles, by="y")
    return _inline(out.getvalue(), title, pointed)


def band_plot(steps: Sequence[float], seeds: Floats, *, title: str, percent: bool = False) -> str:
    """An `<svg>` element: the mean of several runs over steps, in a band from lowest to highest.

    seeds: [seeds, steps]; where there are many steps, each seed is smoothed first.
    """
    smoothed = len(steps) >= _SMOOTH_FROM
    lines = np.array([_smooth(line) for line in seeds]) if smoothed else np.asarray(seeds)
    with _figure(title, _SIZE) as (figure, axes, out):
        low, high = lines.min(axis=0), lines.max(axis=0)
        axes.fill_between(steps, low, high, color=_SERIES[0], alpha=0.22, linewidth=0)
        _line(axes, steps, lines.mean(axis=0), _SERIES[0])
        if percent and low.min() >= 0 and high.max() > 0.5:
            axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_ROUND))
        axes.yaxis.set_major_formatter(_PERCENT if percent else _SHORT)
        _steps(axes, steps)
        _frame(figure, axes, "step")
        rows = zip(steps, lines.mean(axis=0), low, high, strict=True)
        points = [_Point(1, x, y, "mean", _shown(y, percent, *ends)) for x, y, *ends in rows]
        pointed = _under_pointer(figure, axes, points, {p.x: f"step {p.x:g}" for p in points})
    return _inline(out.getvalue(), title, pointed)


_PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 2):g}%")
_ROUND = [1, 2, 2.5, 5, 10]
_SHORT = FuncFormatter(lambda value, _: short(value))


_GROUPS = 150  # positions of a plot that have values under the pointer


def _steps(axes: Axes, steps: Sequence[float]) -> None:
    """Whole numbers below a plot; a lone point stands in the middle."""
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
        axes.set_xticks([steps[0]])


def _decades(axes: Axes, low: float, high: float) -> None:
    """At most five powers of ten beside a plot; within one decade, round numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    gap = max(1, math.ceil((last - first) / 4))
    decades = [10.0**power for power in range(first, last + 1, gap)]
    inside = [tick for tick in decades if low <= tick <= high]
    if len(inside) < 2:
        inside = [
            m * 10.0**first for m in (1, 2, 5, 10) if low / 1.5 <= m * 10.0**first <= high * 1.5
        ]
    axes.minorticks_off()
    axes.set_yticks(inside, [short(tick) for tick in inside])


def _with_band(curve: Curve) -> Iterator[tuple[float, float, float | None, float | None]]:
    """(step, value, low, high) of each point; without a band the ends are None."""
    nothing: list[None] = [None] * len(curve.values)
    yield from zip(
        curve.steps, curve.values, curve.low or nothing, curve.high or nothing, strict=True
    )


def _shown(value: float, percent: bool, low: float | None = None, high: float | None = None) -> str:
    """A value with its interval, as text."""

    def text(number: float) -> str:
        return f"{100 * number:.1f}" if percent else f"{number:.4g}"

    unit = " %" if percent else ""
    if low is None or high is None or low == high:
        return f"{text(value)}{unit}"
    return f"{text(value)}{unit} [{text(low)}, {text(high)}]"


def _under_pointer(
    figure: Figure,
    axes: Axes,
    points: Sequence[_Point],
    titles: Mapping[float, str],
    *,
    by: Literal["x", "y"] = "x",
) -> str:
    """What the page's script shows under the pointer, as JSON: the points of each position.

    titles: by position, which is the points' x, or the row (y) of dots. Lengths are those of the
    SVG's viewBox.
    """
    scale, height = 72 / figure.dpi, 72 * figure.get_figheight()
    axes.get_xlim(), axes.get_ylim()  # as autoscaled

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return round(across * scale, 1), round(height - up * scale, 1)

    positions = sorted(titles)
    if len(positions) > _GROUPS:
        gap = (len(positions) - 1) / (_GROUPS - 1)
        positions = [positions[round(i * gap)] for i in range(_GROUPS)]
    grouped: dict[float, list[_Point]] = {position: [] for position in positions}
    for point in points:
        group = grouped.get(point.x if by == "x" else point.y)
        if group is not None:
            group.append(point)
    groups = []
    for position, members in grouped.items():
        if members:
            places = [at(point.x, point.y) for point in members]
            this, other = (0, 1) if by == "x" else (1, 0)
            shown = [
                [p.series, place[other], p.name, p.value]
                for p, place in zip(members, places, strict=True)
            ]
            groups.append([places[0][this], titles[position], shown])
    box = axes.get_position()
    ends = {"from": round(height * (1 - box.y1), 1), "to": round(height * (1 - box.y0), 1)}
    return json.dumps({"by": by, **ends, "groups": groups}, separators=(",", ":"))


def _line(axes: Axes, steps: Sequence[float], values: Sequence[float] | Floats, color: str) -> None:
    marker = "o" if len(values) < 12 else ""  # a curve of few points is those points
    look: Look = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.9}
    axes.plot(steps, values, solid_capstyle="round", **look)


def _frame(figure: Figure, axes: Axes, x_label: str) -> None:
    """The same frame for all curves, so that their axes are aligned in the page's grid."""
    axes.set_xlabel(x_label, color=_INK)
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    figure.subplots_adjust(left=0.15, right=0.965, top=0.955, bottom=0.22)


def _arms(marker: Marker) -> list[list[float]]:
    """The interval as lengths below and above the value, as matplotlib wants it."""
    return [[max(0.0, marker.value - marker.low)], [max(0.0, marker.high - marker.value)]]


@contextmanager
def _figure(title: str, size: tuple[float, float]) -> Iterator[tuple[Figure, Axes, io.StringIO]]:
    """Axes in the page's style; when the block ends, the third value holds the SVG file."""
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "axes.unicode_minus": False}
    ):
        figure = Figure(figsize=size)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        out = io.StringIO()
        yield figure, axes, out
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        axes.tick_params(colors=_RULE, labelcolor=_INK, length=0, which="both")
        canvas.print_svg(out, metadata={"Date": None, "Creator": None})


def short(value: float) -> str:
    """A number in few characters: 21k, 0.35, 2e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-3:
        return re.sub(r"e-0", "e-", f"{value:.2g}")
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def _inline(svg: str, title: str, pointed: str) -> str:
    """The `<svg>` element without what a separate file needs; colours become CSS variables.

    pointed: what `_under_pointer` gives.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # The paper-white rectangles behind figure and axes.
    svg = re.sub(r'<g id="patch_[12]">.*?</g>\s*', "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>\s*", "", svg, flags=re.DOTALL)
    # Ids must be unique on a page of several plots; only those of clip paths are referred to.
    svg = re.sub(
        r' id="(?:figure|axes|patch|line2d|FillBetween|matplotlib|xtick|ytick|text)[^"]*"', "", svg
    )
    # Matplotlib writes the long form for plain text and the short one for exponents.
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", svg)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    view = re.search(r'viewBox="[^"]*"', svg)
    if view is None:
        raise RuntimeError("matplotlib wrote an SVG without viewBox")
    body = svg[svg.index(">") + 1 :].strip()
    data = html.escape(pointed)
    return f'<svg role="img" aria-label="{label}" {view[0]} data-plot="{data}">{body}'


def endpoints(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last twentieth of a curve (at least one value)."""
    width = max(1, math.ceil(len(values) / 20))
    return float(np.mean(values[:width])), float(np.mean(values[-width:]))
