"""What models wrote: the same problem at every evaluated checkpoint, and through training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.files import JsonObject
from r1jax.report.wording import shortened

_PROBLEMS_SHOWN = 6  # of one group; of each of several domains fewer
_PROBLEMS_OF_A_DOMAIN = 2
_STEPS_SHOWN = 5

# Columns of samples.jsonl that the page reads; rows without them (of another format) are not shown.
_NEEDED = {"problem_id", "sample", "prompt", "answer", "completion", "outcome"}


@dataclass(frozen=True)
class Answer:
    """One completion as the page shows it; `thought` ends with `</think>`."""

    thought: str
    rest: str
    outcome: str
    length: int | None
    step: int | None


@dataclass
class Problem:
    """One problem in one evaluation: its first sample, and how many are right.

    Only this is kept of a file of samples, which may be larger than the memory.
    """

    sample: int
    domain: str
    prompt: str
    answer: str
    first: Answer
    right: int = 0
    scored: int = 0


@dataclass(frozen=True)
class Side:
    """One evaluation of a dataset: a heading, and a smaller one."""

    label: str
    note: str
    problems: Mapping[int, Problem]


@dataclass(frozen=True)
class Compared:
    """One problem, with each side's samples of it; None: not sampled (yet)."""

    prompt: str
    answer: str
    sides: list[tuple[Side, Problem | None]]


@dataclass(frozen=True)
class Group:
    """Problems of one dataset and domain."""

    title: str
    problems: list[Compared]


@dataclass(frozen=True)
class StepSample:
    """The first stored sample of a training step."""

    question: str
    answer: Answer


@dataclass(frozen=True)
class SamplesByStep:
    """Samples of training; `same`: all of one question, whose `prompt` and `answer` are given."""

    stage: str
    same: bool
    prompt: str
    answer: str
    steps: list[StepSample]


def side_by_side(run: Run, before: StageRecord | None, after: StageRecord | None) -> list[Group]:
    """Held-out problems with every checkpoint's first sample, the compared benchmark's first."""
    evaluations: dict[str, list[StageRecord]] = {}
    for stage in run.evaluations():
        evaluations.setdefault(run.benchmark(stage.data), []).append(stage)
    compared = after or before
    groups = []
    for data, stages in sorted(evaluations.items(), key=lambda item: compared not in item[1]):
        sides = [_side(run, stage, stages, before, after) for stage in stages]
        old = sides[stages.index(before)] if before in stages else sides[0]
        new = sides[stages.index(after)] if after in stages else sides[-1]
        domains: dict[str, set[int]] = {}
        for side in sides:
            for key, problem in side.problems.items():
                domains.setdefault(problem.domain, set()).add(key)
        limit = _PROBLEMS_SHOWN if len(domains) == 1 else _PROBLEMS_OF_A_DOMAIN
        for domain in sorted(domains):
            chosen = choose_problems(old.problems, new.problems, domains[domain], limit)
            title = data if len(domains) == 1 else f"{domain or 'no domain'} ({data})"
            groups.append(Group(title, [_compared(key, sides) for key in chosen]))
    return groups


def choose_problems(
    old: Mapping[int, Problem],
    new: Mapping[int, Problem],
    candidates: set[int],
    limit: int,
) -> list[int]:
    """Which problems to show: by rule, not by eye.

    In the order of problem ids: those that became right, then at most one that is still wrong, one
    that was lost and one that was right already; problems that both sides have come first.
    """
    keys = sorted(candidates & old.keys() & new.keys()) or sorted(candidates)
    changes: dict[tuple[bool, bool], list[int]] = {}
    for key in keys:
        was, now = (key in side and side[key].first.outcome == "right" for side in (old, new))
        changes.setdefault((was, now), []).append(key)
    kept_few = ((False, False), (True, False), (True, True))
    rare = [key for change in kept_few for key in changes.get(change, [])[:1]][: limit - 1]
    chosen = changes.get((False, True), [])[: limit - len(rare)] + rare
    # Where one of these is missing, others take its place.
    return chosen + [key for key in keys if key not in chosen][: limit - len(chosen)]


def _side(
    run: Run,
    stage: StageRecord,
    stages: Sequence[StageRecord],
    before: StageRecord | None,
    after: StageRecord | None,
) -> Side:
    weights = run.weights_of(stage.name)
    if list(stages) == [before, after]:
        return Side("Before" if stage is before else "After", weights or "", _problems(stage))
    if weights is None:
        return Side(stage.name, "", _problems(stage))
    twice = sum(run.weights_of(other.name) == weights for other in stages) > 1
    return Side(weights, stage.name if twice else "", _problems(stage))


def _compared(key: int, sides: Sequence[Side]) -> Compared:
    # The shortest prompt has the least of a template around the question.
    problems = (side.problems[key] for side in sides if key in side.problems)
    problem = min(problems, key=lambda each: len(each.prompt))
    answers = [(side, side.problems.get(key)) for side in sides]
    return Compared(problem.prompt, problem.answer, answers)


def _samples(stage: StageRecord) -> Iterator[JsonObject]:
    return (row for row in stage.rows("samples.jsonl") if row.keys() >= _NEEDED)


def _problems(stage: StageRecord) -> dict[int, Problem]:
    problems: dict[int, Problem] = {}
    for row in _samples(stage):
        key, sample = row["problem_id"], row["sample"]
        problem = problems.get(key)
        if problem is None:
            problem = problems[key] = Problem(
                sample,
                str(row.get("domain") or ""),
                shortened(str(row["prompt"])),
                shortened(str(row["answer"])),
                _answer(row),
            )
        elif sample < problem.sample:
            problem.sample, problem.first = sample, _answer(row)
        problem.right += row["outcome"] == "right"
        problem.scored += row["outcome"] != "verifier_failed"
    return problems


def _answer(row: JsonObject) -> Answer:
    thought, rest = split_thought(shortened(str(row["completion"])))
    return Answer(thought, rest, str(row["outcome"]), row.get("length"), row.get("step"))


def split_thought(text: str) -> tuple[str, str]:
    """A response up to and including its last `</think>`, and what follows."""
    thought, tag, rest = text.rpartition("</think>")
    return thought + tag, rest


def samples_by_step(stage: StageRecord) -> SamplesByStep | None:
    """Samples of training over time: of one question if it came up often enough, else of several.

    None where the kind of stage stores none, and before the first ones.
    """
    if not stage.description.shows_samples:
        return None
    firsts: dict[int, dict[int, JsonObject]] = {}  # question -> step -> its first sample
    for row in _samples(stage):
        firsts.setdefault(row["problem_id"], {}).setdefault(row["step"], row)
    if not firsts:
        return None
    by_step = max(firsts.values(), key=len)
    same = len(by_step) >= 3
    if not same:
        by_step = {}
        for steps in firsts.values():
            for step, row in steps.items():
                by_step.setdefault(step, row)
    rows = [by_step[step] for step in sorted(by_step)]
    if len(rows) > _STEPS_SHOWN:
        gap = (len(rows) - 1) / (_STEPS_SHOWN - 1)
        rows = [rows[round(i * gap)] for i in range(_STEPS_SHOWN)]
    return SamplesByStep(
        stage=stage.name,
        same=same,
        prompt=shortened(str(rows[0]["prompt"])),
        answer=shortened(str(rows[0]["answer"])),
        steps=[StepSample(shortened(str(row["prompt"])), _answer(row)) for row in rows],
    )
