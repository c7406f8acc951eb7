"""What each stage of reinforcement learning changed, problem by problem."""

from __future__ import annotations

from typing import NamedTuple

from r1jax.evaluation.evolution import (
    PassAtK,
    ProblemFigures,
    by_difficulty,
    figures_by_problem,
    pass_at_k_gain,
)
from r1jax.evaluation.metrics import Estimate
from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.wording import Figure, Heading, Table, figure, plural
from r1jax.settings.reflection import compile_patterns


class Evolution(NamedTuple):
    """Of one stage: the evaluations of its weights before and after it, by difficulty; what more
    samples of a problem show."""

    stage: str
    table: Table
    pass_at_k: str


def evolutions(run: Run) -> list[Evolution]:
    """Of the stages of reinforcement learning that were evaluated before and after."""
    figures: dict[str, dict[int, ProblemFigures]] = {}
    patterns = compile_patterns(run.config.get("reflections") or [])
    made = []
    for stage in run.stages:
        for old, new in _evaluated(run, stage)[:1]:
            for each in (old, new):
                if each.name not in figures:
                    figures[each.name] = figures_by_problem(each.rows("samples.jsonl"), patterns)
            before, after = figures[old.name], figures[new.name]
            classes = by_difficulty(before, after)
            gain = pass_at_k_gain(before, after)
            if not classes or gain is None:
                continue
            labels = [("pass@1", "before"), ("pass@1", "after"), ("tokens", "before")]
            labels += [("tokens", "after")]
            if patterns:  # of a run of an older version nothing is known
                labels += [("reflections", "before"), ("reflections", "after")]
            rows = [
                (
                    Heading(each.label, plural(each.problems, "problem")),
                    [
                        *(_figure(value, percent=True) for value in each.right),
                        *(_figure(value) for value in each.length),
                        *(_figure(value, digits=2) for value in each.reflections),
                    ][: len(labels)],
                )
                for each in classes
            ]
            lead = f"{old.name} → {new.name}, by the share of right samples before"
            table = Table(stage.name, lead, [Heading(*each) for each in labels], rows)
            made.append(Evolution(stage.name, table, _sentence(gain, len(before))))
    return made


def _evaluated(run: Run, stage: StageRecord) -> list[tuple[StageRecord, StageRecord]]:
    """Pairs of finished evaluations of the same problems, before and after a stage of RL."""
    if not (stage.learns and stage.description.shows_samples):
        return []
    source = run.weights_of(stage.name)
    done = [e for e in run.evaluations() if e.summary is not None and not e.config.get("search")]
    of = {
        name: [each for each in done if run.weights_of(each.name) == name]
        for name in (source, stage.name)
    }
    return [
        (old, new)
        for old in of[source]
        for new in of[stage.name]
        if run.benchmark(old.data) == run.benchmark(new.data)
    ]


def _sentence(gain: PassAtK, problems: int) -> str:
    """Whether training adds to what samples of the weights before it could reach."""
    shown = _figure(gain.gain, percent=True)
    change = f"pass@{gain.k} changed by {shown.value.removesuffix(' %')} points [{shown.interval}]"
    counts = (
        f"of {plural(problems, 'problem')}, {gain.solved} were solved that no sample solved "
        f"before, and {gain.lost} no longer"
    )
    if gain.gain.low > 0:
        meaning = "it solves problems that its start did not reach with as many samples"
    elif gain.gain.high < 0:
        meaning = "its start reaches more problems with as many samples: it has become narrower"
    else:
        meaning = (
            "with as many samples its start reaches as many problems, as far as can be told: it "
            "makes likelier what could be done before"
        )
    return f"{change}: {meaning} ({counts})."


def _figure(estimate: Estimate, *, percent: bool = False, digits: int = 1) -> Figure:
    return figure(estimate.to_json(), percent=percent, digits=digits)
