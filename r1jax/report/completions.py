"""What models wrote: the same problem at every evaluated checkpoint, and through training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.report.wording import shortened

_PROBLEMS_SHOWN = 6  # of one group; of each of several domains fewer
_PROBLEMS_OF_A_DOMAIN = 2
_STRIP_STEPS = 5


@dataclass(frozen=True)
class Answer:
    """One completion as the page shows it; `thought` ends with `</think>`."""

    thought: str
    rest: str
    outcome: str
    length: Any
    step: Any


@dataclass
class Problem:
    """One problem in one evaluation: its first sample, and how all of them did.

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
    problems: Mapping[Any, Problem]


@dataclass(frozen=True)
class Compared:
    """One problem, with what each side made of it; None: not sampled (yet)."""

    prompt: str
    answer: str
    sides: list[tuple[Side, Problem | None]]


@dataclass(frozen=True)
class Group:
    """Problems of one dataset and domain."""

    title: str
    problems: list[Compared]


def side_by_side(run: Run, before: StageRecord | None, after: StageRecord | None) -> list[Group]:
    """Held-out problems with every checkpoint's first sample, the compared benchmark's first."""
    evaluations: dict[str, list[StageRecord]] = {}
    for stage in run.stages:
        if stage.kind == "evaluate":
            evaluations.setdefault(run.benchmark(stage.config["data"]), []).append(stage)
    compared = after or before
    groups = []
    for data, stages in sorted(evaluations.items(), key=lambda item: compared not in item[1]):
        sides = [_side(run, stage, stages, before, after) for stage in stages]
        old = sides[stages.index(before)] if before in stages else sides[0]
        new = sides[stages.index(after)] if after in stages else sides[-1]
        domains: dict[str, set[Any]] = {}
        for side in sides:
            for key, problem in side.problems.items():
                domains.setdefault(problem.domain, set()).add(key)
        limit = _PROBLEMS_SHOWN if len(domains) == 1 else _PROBLEMS_OF_A_DOMAIN
        for domain in sorted(domains):
            chosen = choose(old.problems, new.problems, domains[domain], limit)
            title = data if len(domains) == 1 else f"{domain or 'no domain'} ({data})"
            groups.append(Group(title, [_compared(key, sides) for key in chosen]))
    return groups


def choose(
    old: Mapping[Any, Problem], new: Mapping[Any, Problem], among: set[Any], limit: int
) -> list[Any]:
    """Which problems to show: by rule, not by eye.

    In the order of problem ids: those that became right, then at most one that is still wrong, one
    that was lost and one that was right already; problems that both sides have come first.
    """
    keys = sorted(among & old.keys() & new.keys()) or sorted(among)
    kinds: dict[str, list[Any]] = {"became": [], "still wrong": [], "already": [], "lost": []}
    for key in keys:
        was = key in old and old[key].first.outcome == "right"
        now = key in new and new[key].first.outcome == "right"
        kind = ("already" if was else "became") if now else ("lost" if was else "still wrong")
        kinds[kind].append(key)
    rare = [*kinds["still wrong"][:1], *kinds["lost"][:1], *kinds["already"][:1]][: limit - 1]
    chosen = kinds["became"][: limit - len(rare)] + rare
    # Where a kind is missing, others fill its place.
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
    twice = sum(run.weights_of(other.name) == weights for other in stages) > 1
    if weights is None:
        return Side(stage.name, "", _problems(stage))
    return Side(weights, stage.name if twice else "", _problems(stage))


def _compared(key: Any, sides: Sequence[Side]) -> Compared:
    # The shortest prompt has the least of a template around the question.
    found = [side.problems[key] for side in sides if key in side.problems]
    problem = min(found, key=lambda each: len(each.prompt))
    answers = [(side, side.problems.get(key)) for side in sides]
    return Compared(problem.prompt, problem.answer, answers)


def _problems(stage: StageRecord) -> dict[Any, Problem]:
    problems: dict[Any, Problem] = {}
    for row in stage.rows("samples.jsonl"):
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


def _answer(row: Mapping[str, Any]) -> Answer:
    thought, rest = split_thought(shortened(str(row["completion"])))
    return Answer(thought, rest, str(row["outcome"]), row.get("length"), row.get("step"))


def split_thought(text: str) -> tuple[str, str]:
    """A response up to and including its last `</think>`, and what follows."""
    thought, tag, rest = text.rpartition("</think>")
    return thought + tag, rest


def strip(stage: StageRecord) -> dict[str, Any] | None:
    """Training answers over time: of one question if it came up often enough, else of several."""
    if stage.kind != "grpo":
        return None
    firsts: dict[Any, dict[Any, dict[str, Any]]] = {}  # question -> step -> its first sample
    for row in stage.rows("samples.jsonl"):
        firsts.setdefault(row["problem_id"], {}).setdefault(row["step"], row)
    if not firsts:
        return None
    often = max(firsts.values(), key=len)
    same = len(often) >= 3
    if same:
        rows = [often[step] for step in sorted(often)]
    else:
        by_step: dict[Any, dict[str, Any]] = {}
        for steps in firsts.values():
            for step, row in steps.items():
                by_step.setdefault(step, row)
        rows = [by_step[step] for step in sorted(by_step)]
    if len(rows) > _STRIP_STEPS:
        gap = (len(rows) - 1) / (_STRIP_STEPS - 1)
        rows = [rows[round(i * gap)] for i in range(_STRIP_STEPS)]
    return {
        "stage": stage.name,
        "same": same,
        "prompt": shortened(str(rows[0]["prompt"])),
        "answer": shortened(str(rows[0]["answer"])),
        "steps": [
            {"question": shortened(str(row["prompt"])), "answer": _answer(row)} for row in rows
        ],
    }
