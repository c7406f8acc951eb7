"""What a reader of a run must know before its figures: signal that was lost, and no progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from r1jax.evaluation.metrics import Summary
from r1jax.evaluation.results import before_and_after
from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.plots import endpoints
from r1jax.report.wording import figure

# Shares from which on something is worth a warning; all are choices.
_FAILED, _TRUNCATED, _NO_GRADIENT, _SOLVED = 0.01, 0.05, 0.5, 0.9
_GAP = 0.05  # nats, in the mean over tokens; bfloat16 alone makes about a hundredth

Columns = Mapping[str, tuple[list[float], list[float]]]


class RunWarning(NamedTuple):
    """A sentence for the reader; `nothing_learned`: the run cannot count as a success."""

    text: str
    nothing_learned: bool = False


def warnings_of(run: Run) -> list[RunWarning]:
    """All warnings of a run, finished or not: of its data, its stages in order, and its result."""
    found = [RunWarning(line) for line in run.info.get("references") or [] if ": 0 of " not in line]
    for stage in run.stages:
        columns = stage.columns("metrics.jsonl")
        found += _sampling(stage, columns) + _updates(stage, columns)
        if stage.summary is not None:
            found += _samples(stage, stage.summary)
    return found + _result(run)


def _sampling(stage: StageRecord, columns: Columns) -> list[RunWarning]:
    """Of samples to train on: the share at the end of training, or over all of it."""
    found = []
    failed = _mean(columns, "outcome/verifier_failed")
    if failed >= _FAILED:
        found.append(
            f"the verifier failed on {_percent(failed)} of the samples; they were not trained on"
        )
    truncated = _last(columns, "length/truncated")
    if truncated >= _TRUNCATED:
        found.append(
            f"{_percent(truncated)} of the last completions were cut off at the length limit; "
            "raise max_new_tokens, or look at what they repeat"
        )
    equal, right = _last(columns, "groups/zero_variance"), _last(columns, "outcome/right")
    if equal >= _NO_GRADIENT and right < _SOLVED:
        found.append(
            f"in {_percent(equal)} of the last groups all samples earned the same, so they had no "
            f"gradient, while {_percent(right)} were right; take questions of another difficulty, "
            "or more samples of each"
        )
    gap = _last(columns, "sampler/gap_mean")
    if gap >= _GAP:
        found.append(
            f"the sampler's log-probs were {gap:.2g} nats from the trainer's in the mean at the "
            "end (sampler gap); the samples are not those of the policy that is trained"
        )
    return [RunWarning(f"{stage.name}: {text}") for text in found]


def _updates(stage: StageRecord, columns: Columns) -> list[RunWarning]:
    finite = columns.get("optimizer/finite", ([], []))[1]
    skipped = sum(value < 1 for value in finite)
    found = []
    if skipped:
        text = f"{skipped} of {len(finite)} updates were not finite and skipped"
        found.append(RunWarning(f"{stage.name}: {text}", skipped == len(finite)))
    equal = columns.get("groups/zero_variance", ([], []))[1]
    if equal and min(equal) == 1:
        text = "no group ever had a gradient, for all its samples earned the same"
        found.append(RunWarning(f"{stage.name}: {text}", nothing_learned=True))
    return found


def _samples(stage: StageRecord, summary: Summary) -> list[RunWarning]:
    """Of an evaluation, or of a dataset that was sampled, which counts why samples were removed."""
    counts = summary.get("samples") or 0
    if isinstance(counts, Mapping):
        total = sum(counts.values())
        unscored, cut = counts.get("verifier_failed", 0), counts.get("truncated", 0)
    else:
        total = (summary.get("problems") or 0) * counts
        unscored, cut = (summary.get(f"{n}_samples") or 0 for n in ("unscored", "truncated"))
    if not total:
        return []
    found = []
    failed, truncated = unscored / total, cut / total
    if failed >= _FAILED:
        found.append(f"the verifier failed on {_percent(failed)} of the samples; they do not count")
    if truncated >= _TRUNCATED:
        found.append(f"{_percent(truncated)} of the samples were cut off at the length limit")
    if stage.is_evaluation and summary.get("unanswered_samples", 0) is None:
        found.append(
            "there are no votes (cons@k): the reward that judges names no answers; return "
            "Score(reward, outcome, extracted=...) in place of a number"
        )
    return [RunWarning(f"{stage.name}: {text}") for text in found]


def _result(run: Run) -> list[RunWarning]:
    """Whether training did something: by the evaluations before and after, else by its curves."""
    sides = [each.summary for each in before_and_after(run) if each is not None and each.summary]
    if len(sides) == 2:
        return _difference("", *sides)
    found = []
    for stage in [stage for stage in run.stages if stage.status == "done"]:
        rows = list(stage.rows("held_out.jsonl"))
        if len(rows) > 1:
            found += _difference(f"{stage.name}: held-out ", rows[0], rows[-1])
        elif not run.evaluations():
            found += _curve(stage)
    return found


def _difference(what: str, before: Summary, after: Summary) -> list[RunWarning]:
    """Whether pass@1 of `what` has grown beyond the intervals."""
    old, new = (each.get("pass_at_1") or {} for each in (before, after))
    if old.get("value") is None or new.get("value") is None:
        return []
    shown = " and ".join(
        f"{value.value} [{value.interval}]"
        for value in (figure(each, percent=True) for each in (old, new))
    )
    low, high = (new.get("low") or 0.0), (old.get("high") or 0.0)
    if new["value"] < old["value"] and (new.get("high") or 1.0) < (old.get("low") or 0.0):
        text = f"{what}pass@1 is lower after training than before: {shown}"
        return [RunWarning(text, nothing_learned=True)]
    if low > high:
        return []
    text = f"{what}pass@1 before and after training cannot be told apart: {shown}"
    return [RunWarning(text, nothing_learned=True)]


def _curve(stage: StageRecord) -> list[RunWarning]:
    """Of a run without evaluations: a reward that did not rise, a loss that did not fall."""
    if not stage.description.trains:
        return []
    columns = stage.columns("metrics.jsonl")
    name, sign = ("reward/mean", 1) if "reward/mean" in columns else ("loss", -1)
    values = columns.get(name, ([], []))[1]
    if len(values) < 2:
        return []
    first, last = endpoints(values)
    if sign * (last - first) > 0:
        return []
    moved = "the reward did not rise" if sign > 0 else "the loss did not fall"
    text = f"{stage.name}: {moved}, from {first:.3g} to {last:.3g}"
    return [RunWarning(text, nothing_learned=True)]


def _mean(columns: Columns, name: str) -> float:
    values = columns.get(name, ([], []))[1]
    return sum(values) / len(values) if values else 0.0


def _last(columns: Columns, name: str) -> float:
    """The mean over the last twentieth; 0 where there is no such metric."""
    values = columns.get(name, ([], []))[1]
    return endpoints(values)[1] if values else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
