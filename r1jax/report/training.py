"""Curves of the train stages: what the recorder wrote, as small plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from r1jax.evaluation.metrics import Summary
from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.plots import SERIES, Curve, Marker, endpoints, line_plot, short

Columns = Mapping[str, tuple[list[float], list[float]]]


class Panel(NamedTuple):
    """One plot: `keys` maps columns of the metrics to names of lines."""

    title: str
    keys: Mapping[str, str]
    note: str = ""
    percent: bool = False
    log: bool = False
    held_out: str | None = None  # the evaluations' figure that is drawn beside the training curve
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
        "Divergence to the teacher",
        {
            "distillation/divergence": "training, nats per token",
            "held_out/distillation/divergence": "held-out, nats per token",
        },
    ),
    Panel(
        "Agreement with the teacher",
        {
            "distillation/agreement": "training",
            "held_out/distillation/agreement": "held-out",
        },
        "Share of tokens at which both have the same likeliest one.",
        percent=True,
    ),
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
        "What the critic knows",
        {"critic/explained_variance": "share of the returns' variance"},
        "1 - Var(return - value) / Var(return); below 0 it is worse than one value for all tokens.",
        percent=True,
    ),
    Panel("Values", {"critic/value_mean": "mean value", "critic/return_mean": "mean return"}),
    Panel(
        "Throughput",
        {
            "tokens_per_second/rollout": "sampler, tokens/s",
            "tokens_per_second/update": "update, tokens/s",
        },
        file="timings.jsonl",
    ),
    Panel(
        "Reflection",
        {"reflection/per_completion": "matches per completion"},
        "Of the patterns in `reflections`: reflective words, or steps that are worked again.",
    ),
    Panel(
        "Attempts",
        {f"attempts/right_{k}": f"attempt {k}" for k in range(1, 5)},
        "Answers right at each attempt at a question.",
        percent=True,
    ),
    Panel(
        "Self-correction",
        {"attempts/mended": "mended", "attempts/spoilt": "spoilt"},
        "Wrong at first and right at last, and the other way round; shares of all samples.",
        percent=True,
    ),
    Panel("Longest completion", {"length/max": "tokens"}),
    Panel("Learning rate", {"optimizer/learning_rate": "after schedule"}),
)
_PREFERENCES = Panel(
    "Judged right",
    {"accuracy": "training", "held_out/accuracy": "held-out"},
    "Share of pairs whose better side scores higher; of single answers, on the right side of 0.",
    percent=True,
)
_STEPS = Panel(
    "Steps judged right",
    {
        "accuracy": "training",
        "held_out/accuracy": "held-out",
        "held_out/auc": "held-out, AUC",
        "right": "labelled right",
    },
    "Share of labelled steps on the right side of one half; the AUC is the probability that a "
    "right step scores higher than a wrong one.",
    percent=True,
)
_BAND = "95 % interval over problems"


class _DrawnPanel(NamedTuple):
    """A finished panel for the template; `first` and `last` are the ends of its first curve."""

    title: str
    svg: Markup
    legend: list[str]
    first: str
    last: str
    note: str
    markers: bool


def training(
    run: Run, stage: StageRecord, benchmark: str | None
) -> tuple[list[_DrawnPanel], list[_DrawnPanel]] | None:
    """All plots of one train stage, then those of metrics that no panel names; None before any.

    Held-out evaluations during training come first: they are what the training is for. Into the
    curves go the evaluations, on `benchmark`, of the weights it starts from and of its result.
    """
    metrics = stage.columns("metrics.jsonl")
    if not metrics:
        return None
    columns = {"metrics.jsonl": metrics, "timings.jsonl": stage.columns("timings.jsonl")}
    panels = panels_of(stage, metrics)
    known = {key for panel in panels for key in panel.keys}
    last_step = max(steps[-1] for steps, _ in metrics.values())
    step_of = {run.weights_of(stage.name): 0.0, stage.name: last_step}
    evaluations = [
        (step_of[weights], other.summary)
        for other in run.evaluations()
        if other.summary is not None
        and run.benchmark(other.data) == benchmark
        and (weights := run.weights_of(other.name)) is not None
        and weights in step_of
    ]
    held_out = _held_out(list(stage.rows("held_out.jsonl")))
    drawn = [_draw(panel, curves) for panel, curves in held_out]
    for panel in panels:
        named = [(step, summary.get(panel.held_out or "")) for step, summary in evaluations]
        if curves := _curves(panel, columns[panel.file]):
            drawn.append(_draw(panel, curves, Marker.all_of(named)))
    others = [Panel(key, {key: key}) for key in sorted(metrics.keys() - known)]
    return drawn, [_draw(panel, _curves(panel, metrics)) for panel in others]


def panels_of(stage: StageRecord, metrics: Columns) -> list[Panel]:
    """The panels that the kind of stage puts first, then those of all kinds."""
    rewards = [name for name in sorted(metrics) if name.startswith("reward/")]
    rewards.sort(key=lambda name: name != "reward/mean")
    reward_lines = {n: "sum" if n == "reward/mean" else n.removeprefix("reward/") for n in rewards}
    domains = [name for name in sorted(metrics) if name.startswith("domain/")]
    leading = stage.description.leading_panels
    training_loss = "training" if "held_out/loss" in metrics else "loss"
    panels = {
        "reward": Panel("Reward", reward_lines),
        **({"steps": _STEPS} if "steps" in leading else {"preferences": _PREFERENCES}),
        "loss": Panel(
            "Loss",
            {"loss": training_loss, "held_out/loss": "held-out"},
            stage.description.loss_note,
        ),
    }
    return [
        *(panels.pop(name, Panel(name, {name: name})) for name in leading),
        *_PANELS,
        Panel("Reward by domain", {name: name.removeprefix("domain/") for name in domains}),
        *panels.values(),
    ]


def _held_out(rows: Sequence[Summary]) -> list[tuple[Panel, list[Curve]]]:
    """Panels and curves of the evaluations that a stage made as it trained, one row for each."""
    if not rows:
        return []

    def line(name: str, figure: str, domain: str | None = None, *, band: bool = False) -> Curve:
        summaries = [row if domain is None else row["by_domain"].get(domain, {}) for row in rows]
        named = [(row["step"], s.get(figure)) for row, s in zip(rows, summaries, strict=True)]
        return Curve.of(name, Marker.all_of(named), band=band)

    problems, samples = rows[0]["problems"], rows[0]["samples"]
    note = f"{problems} problems that are not trained on, {samples} samples each"
    accuracy = [line("pass@1", "pass_at_1", band=True)]
    if samples > 1:
        accuracy.append(line(f"cons@{samples}", f"cons_at_{samples}"))
    length = [line("mean tokens per completion", "mean_length", band=True)]
    attempts = _attempts(rows)
    by_domain = rows[0].get("by_domain", {})
    domains = [line(domain or "none", "pass_at_1", domain) for domain in by_domain]
    panels = [
        ("accuracy over training", f"{note}; with pass@1's {_BAND}.", True, accuracy),
        ("length over training", f"Of the same samples, with its {_BAND}.", False, length),
        ("accuracy by domain", "Of the same samples, pass@1.", True, domains),
        ("self-correction", "Accuracy of each attempt; mended, spoilt.", True, attempts),
    ]
    return [
        (Panel(f"Held-out {title}", {}, note, percent=percent), known)
        for title, note, percent, curves in panels
        if (known := [curve for curve in curves if curve.values])
    ]


def _attempts(rows: Sequence[Summary]) -> list[Curve]:
    """Curves of the accuracy of each attempt, and of the shares mended and spoilt."""
    found = [(row["step"], row["attempts"]) for row in rows if "attempts" in row]
    if not found:
        return []
    names = {name: name.replace("right_", "attempt ") for name in found[0][1]}
    return [
        Curve.of(label, Marker.all_of([(step, each.get(name)) for step, each in found]))
        for name, label in names.items()
        if name != "difference"
    ]


def _curves(panel: Panel, columns: Columns) -> list[Curve]:
    return [Curve(label, *columns[key]) for key, label in panel.keys.items() if key in columns]


def _draw(panel: Panel, curves: Sequence[Curve], markers: Sequence[Marker] = ()) -> _DrawnPanel:
    svg = line_plot(
        curves[:SERIES], title=panel.title, percent=panel.percent, log=panel.log, markers=markers
    )
    first, last = endpoints(curves[0].values)
    text = (lambda v: f"{100 * v:.1f} %") if panel.percent else short
    legend, ends = [curve.name for curve in curves[:SERIES]], (text(first), text(last))
    return _DrawnPanel(panel.title, Markup(svg), legend, *ends, panel.note, bool(markers))
