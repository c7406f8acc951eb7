"""Curves of the train stages: what the recorder wrote, as small plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.plots import SERIES, Curve, Marker, endpoints, line_plot, short

Columns = Mapping[str, tuple[list[float], list[float]]]
Figure = tuple["Panel", Sequence[Curve], Sequence[Marker]]


@dataclass(frozen=True)
class Panel:
    """One plot: `keys` maps columns of the metrics to names of lines."""

    title: str
    keys: Mapping[str, str]
    note: str = ""
    percent: bool = False
    log: bool = False
    held_out: str | None = None  # the evaluation's figure drawn beside the training curve
    file: str = "metrics.jsonl"


_PANELS = (
    Panel(
        "Accuracy",
        {"outcome/right": "training answers right"},
        "On the questions just trained on, at the training temperature.",
        percent=True,
        held_out="pass_at_1",
    ),
    Panel("Length", {"length/mean": "mean tokens per completion"}, held_out="mean_length"),
    Panel(
        "Entropy",
        {"policy/entropy": "nats per token"},
        "How undecided the policy is; a fall to zero ends exploration.",
    ),
    Panel("KL to the reference", {"policy/kl": "k3 estimate, nats per token"}),
    Panel(
        "Outcomes",
        {
            "outcome/wrong": "wrong",
            "outcome/unparseable": "no answer found",
            "outcome/verifier_failed": "verifier failed (left out of the loss)",
        },
        percent=True,
    ),
    Panel(
        "Lost signal",
        {"groups/zero_variance": "groups with equal rewards", "length/truncated": "cut off"},
        "A group whose samples all earn the same gives no gradient.",
        percent=True,
    ),
    Panel(
        "Sampler gap",
        {"sampler/gap_max": "largest", "sampler/gap_mean": "mean"},
        "Difference of sampler's and trainer's log-probabilities of the same tokens.",
        log=True,
    ),
    Panel("Gradient norm", {"optimizer/grad_norm": "before clipping"}),
    Panel("Clipped tokens", {"policy/clip_fraction": "share of tokens"}, percent=True),
    Panel(
        "Throughput",
        {
            "tokens_per_second/rollout": "sampler, tokens/s",
            "tokens_per_second/update": "update, tokens/s",
        },
        file="timings.jsonl",
    ),
    Panel("Longest completion", {"length/max": "tokens"}),
    Panel("Learning rate", {"optimizer/learning_rate": "after schedule"}),
)
_PAIRS = Panel(
    "Judged right",
    {"accuracy": "training", "held_out/accuracy": "held-out"},
    "Share of pairs whose better side scores higher; of single answers, on the right side of 0.",
    percent=True,
)
_HELD_OUT_ACCURACY = "Held-out accuracy over training"
_HELD_OUT_LENGTH = "Held-out length over training"
_HELD_OUT_DOMAINS = "Held-out accuracy by domain"
_BAND = "95 % interval over problems"
_LOSS_NOTES = {
    "pretrain": "Next-token cross-entropy, nats.",
    "sft": "Cross-entropy of the assistant's tokens, nats.",
    "reward_model": "Negative log-likelihood of the labels, nats.",
    "grpo": "Near zero by design: advantages of a group sum to zero. Read reward and gradient "
    "norm in its place.",
}


@dataclass(frozen=True)
class Drawn:
    """A finished panel for the template."""

    title: str
    svg: Markup
    legend: list[str]
    first: str
    last: str
    note: str
    markers: bool


def training(run: Run, stage: StageRecord, benchmark: str | None) -> dict[str, Any] | None:
    """All plots of one train stage; None for other stages, and before its first metrics.

    Held-out evaluations during training come first: they are what the training is for.

    Args:
      benchmark: the dataset whose evaluations are drawn into the curves: of the weights that the
        stage starts from, and of its own.
    """
    metrics = stage.columns("metrics.jsonl")
    if not metrics:
        return None
    columns = {"metrics.jsonl": metrics, "timings.jsonl": stage.columns("timings.jsonl")}
    panels = _panels(stage.kind, metrics)
    known = {key for panel in panels for key in panel.keys}
    last_step = max(steps[-1] for steps, _ in metrics.values())
    held_out = _evaluations(run, stage, benchmark, last_step) if stage.kind == "grpo" else []
    shown: list[Figure] = [
        (panel, curves, []) for panel, curves in _held_out(list(stage.rows("held_out.jsonl")))
    ]
    shown += [
        (panel, _curves(panel, columns[panel.file]), _markers(panel, held_out)) for panel in panels
    ]
    others = [Panel(key, {key: key}) for key in sorted(metrics.keys() - known)]
    return {
        "panels": [_draw(*figure) for figure in shown if figure[1]],
        "others": [_draw(panel, _curves(panel, metrics), []) for panel in others],
    }


def _panels(kind: str, metrics: Columns) -> list[Panel]:
    """The panels of a kind of stage; the first three say most."""
    loss = Panel(
        "Loss",
        {"loss": "training" if "held_out/loss" in metrics else "loss", "held_out/loss": "held-out"},
        _LOSS_NOTES.get(kind, ""),
    )
    if kind == "reward_model":
        return [loss, _PAIRS, *_PANELS]
    if kind != "grpo":
        return [loss, *_PANELS]
    parts = [name for name in sorted(metrics) if name.startswith("reward/")]
    parts.sort(key=lambda name: name != "reward/mean")
    reward = Panel(
        "Reward",
        {name: "sum" if name == "reward/mean" else name.removeprefix("reward/") for name in parts},
    )
    domains = [name for name in sorted(metrics) if name.startswith("domain/")]
    by_domain = Panel("Reward by domain", {n: n.removeprefix("domain/") for n in domains})
    return [reward, *_PANELS, by_domain, loss]


def _held_out(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Panel, list[Curve]]]:
    """Panels and curves of the evaluations that a stage made as it trained, one row for each."""
    if not rows:
        return []

    def line(name: str, figure: str, domain: str | None = None, *, band: bool = False) -> Curve:
        summaries = [row if domain is None else row["by_domain"][domain] for row in rows]
        found = [
            Marker.of(row["step"], summary.get(figure))
            for row, summary in zip(rows, summaries, strict=True)
        ]
        return Curve.of(name, [marker for marker in found if marker is not None], band=band)

    problems, samples = rows[0]["problems"], rows[0]["samples"]
    asked = f"{problems} problems that are not trained on, {samples} samples each"
    vote = [line(f"cons@{samples}", f"cons_at_{samples}")] if samples > 1 else []
    accuracy = [line("pass@1", "pass_at_1", band=True), *vote]
    length = [line("mean tokens per completion", "mean_length", band=True)]
    domains = [
        line(domain or "none", "pass_at_1", domain) for domain in rows[0].get("by_domain", {})
    ]
    figures = [
        (Panel(_HELD_OUT_ACCURACY, {}, f"{asked}; with pass@1's {_BAND}.", percent=True), accuracy),
        (Panel(_HELD_OUT_LENGTH, {}, f"Of the same samples, with its {_BAND}."), length),
        (Panel(_HELD_OUT_DOMAINS, {}, "Of the same samples, pass@1.", percent=True), domains),
    ]
    known = [(panel, [curve for curve in curves if curve.values]) for panel, curves in figures]
    return [(panel, curves) for panel, curves in known if curves]


def _evaluations(
    run: Run, stage: StageRecord, benchmark: str | None, last_step: float
) -> list[tuple[float, Mapping[str, Any]]]:
    """(step, summary) of the evaluations before and after a stage."""
    places = {run.weights_of(stage.name): 0.0, stage.name: last_step}
    return [
        (places[weights], other.summary)
        for other in run.stages
        if other.kind == "evaluate"
        and other.summary is not None
        and run.benchmark(other.config["data"]) == benchmark
        and (weights := run.weights_of(other.name)) is not None
        and weights in places
    ]


def _markers(panel: Panel, held_out: Sequence[tuple[float, Mapping[str, Any]]]) -> list[Marker]:
    if panel.held_out is None:
        return []
    found = (Marker.of(step, summary.get(panel.held_out)) for step, summary in held_out)
    return [marker for marker in found if marker is not None]


def _curves(panel: Panel, columns: Columns) -> list[Curve]:
    return [Curve(label, *columns[key]) for key, label in panel.keys.items() if key in columns]


def _draw(panel: Panel, curves: Sequence[Curve], markers: Sequence[Marker]) -> Drawn:
    svg = line_plot(
        curves[:SERIES], title=panel.title, percent=panel.percent, log=panel.log, markers=markers
    )
    first, last = endpoints(curves[0].values)
    text = (lambda v: f"{100 * v:.1f} %") if panel.percent else short
    return Drawn(
        title=panel.title,
        svg=Markup(svg),
        legend=[curve.name for curve in curves[:SERIES]],
        first=text(first),
        last=text(last),
        note=panel.note,
        markers=bool(markers),
    )
