"""What models wrote: the same problem at every checkpoint, through training, and as a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from r1jax.evaluation.metrics import Summary
from r1jax.evaluation.run_directory import Run, StageRecord
from r1jax.files import JsonObject
from r1jax.report.plots import short
from r1jax.report.questions import questions_of
from r1jax.report.wording import shortened

_PROBLEMS_SHOWN = 6  # of one group; of each of several domains fewer
_PROBLEMS_OF_A_DOMAIN = 2
_STEPS_SHOWN = 5
_TEXTS_SHOWN = 4
_SEARCHED = 240  # samples to search through
_ROWS_READ = 10_000  # a set of real size is not read to its end for a few texts

# Columns of samples.jsonl that the page reads; rows without them (of another format) are not shown.
_NEEDED = {"problem_id", "sample", "prompt", "answer", "completion", "outcome"}


class _Answer(NamedTuple):
    """One completion as the page shows it; `thought` ends with `</think>`."""

    thought: str
    rest: str
    outcome: str
    length: int | None
    step: int | None


@dataclass
class _Problem:
    """What is kept of a file of samples, which may be larger than the memory."""

    sample: int
    domain: str
    prompt: str
    answer: str
    first: _Answer
    right: int = 0
    scored: int = 0


class _Side(NamedTuple):
    """One evaluation of a dataset: a heading, and a smaller one."""

    label: str
    note: str
    problems: Mapping[int, _Problem]


class _Compared(NamedTuple):
    """One problem, with each side's samples of it; None: not sampled (yet)."""

    prompt: str
    answer: str
    sides: list[tuple[_Side, _Problem | None]]


class _SamplesByStep(NamedTuple):
    """First samples of training steps; `same`: all of one question, which has `answer`."""

    stage: str
    same: bool
    prompt: str
    answer: str
    steps: list[tuple[str, _Answer]]


def side_by_side(
    run: Run, before: StageRecord | None, after: StageRecord | None
) -> list[tuple[str, list[_Compared]]]:
    """Held-out problems with every checkpoint's first sample, by dataset and domain.

    The benchmark of the evaluations `before` and `after` comes first.
    """
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
            chosen = _choose_problems(old.problems, new.problems, domains[domain], limit)
            title = data if len(domains) == 1 else f"{domain or 'no domain'} ({data})"
            groups.append((title, [_compared(key, sides) for key in chosen]))
    return groups


def _choose_problems(
    old: Mapping[int, _Problem], new: Mapping[int, _Problem], candidates: set[int], limit: int
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
) -> _Side:
    weights, problems = run.weights_of(stage.name), _problems(run, stage)
    if list(stages) == [before, after]:
        return _Side("Before" if stage is before else "After", weights or "", problems)
    twice = sum(run.weights_of(other.name) == weights for other in stages) > 1
    note = stage.name if weights is not None and twice else ""
    return _Side(weights or stage.name, note, problems)


def _compared(key: int, sides: Sequence[_Side]) -> _Compared:
    answers = [(side, side.problems.get(key)) for side in sides]
    # The shortest prompt has the least of a template around the question.
    problem = min((each for _, each in answers if each), key=lambda each: len(each.prompt))
    return _Compared(problem.prompt, problem.answer, answers)


def _samples(stage: StageRecord) -> Iterator[JsonObject]:
    return (row for row in stage.rows("samples.jsonl") if row.keys() >= _NEEDED)


def _problems(run: Run, stage: StageRecord) -> dict[int, _Problem]:
    problems: dict[int, _Problem] = {}
    for row in _samples(stage):
        key, sample = row["problem_id"], row["sample"]
        problem = problems.get(key)
        if problem is None:
            problem = problems[key] = _Problem(
                sample,
                str(row.get("domain") or ""),
                str(row["prompt"]),
                shortened(str(row["answer"])),
                _answer(row),
            )
        elif sample < problem.sample:
            problem.sample, problem.first = sample, _answer(row)
        problem.right += row["outcome"] == "right"
        problem.scored += row["outcome"] != "verifier_failed"
    questions = questions_of((each.prompt for each in problems.values()), run.template_of(stage))
    for each in problems.values():
        each.prompt = shortened(questions[each.prompt])
    return problems


def _answer(row: JsonObject) -> _Answer:
    parts = _split_thought(shortened(str(row["completion"])))
    return _Answer(*parts, str(row["outcome"]), row.get("length"), row.get("step"))


def _split_thought(text: str) -> tuple[str, str]:
    """A response up to and including its last `</think>`, and what follows."""
    thought, tag, rest = text.rpartition("</think>")
    return thought + tag, rest


def samples_by_step(run: Run, stage: StageRecord) -> _SamplesByStep | None:
    """Samples of training over time: of one question if it came up often enough, else several."""
    if not stage.description.shows_samples:
        return None
    firsts: dict[int, dict[int, JsonObject]] = {}  # question -> step -> its first sample
    for row in _samples(stage):
        firsts.setdefault(row["problem_id"], {}).setdefault(row["step"], row)
    if not firsts:
        return None
    by_step = max(firsts.values(), key=len)
    same = len(by_step) >= 3
    if not same:  # of each step the question that came up first
        by_step = {step: r for steps in reversed(firsts.values()) for step, r in steps.items()}
    rows = [by_step[step] for step in sorted(by_step)]
    if len(rows) > _STEPS_SHOWN:
        gap = (len(rows) - 1) / (_STEPS_SHOWN - 1)
        rows = [rows[round(i * gap)] for i in range(_STEPS_SHOWN)]
    prompts = [str(row["prompt"]) for steps in firsts.values() for row in steps.values()]
    questions = questions_of(prompts, run.template_of(stage))
    steps = [(shortened(questions[str(row["prompt"])]), _answer(row)) for row in rows]
    answer = shortened(str(rows[0]["answer"]))
    return _SamplesByStep(stage.name, same, steps[0][0], answer, steps)


class Sample(NamedTuple):
    """A sample for the reader to search; all but `answer` as text."""

    stage: str
    domain: str
    question: str
    right_answer: str
    answer: _Answer


def every_sample(run: Run) -> list[Sample]:
    """Samples of all stages to search through: at most `_SEARCHED`, spread evenly over each stage's
    file; those of evaluations are first samples of their problems."""
    by_stage = []
    for stage in run.stages:
        rows = list(islice(_samples(stage), _ROWS_READ))
        if stage.is_evaluation:
            rows = list({row["problem_id"]: row for row in reversed(rows)}.values())[::-1]
        if rows:
            by_stage.append((stage, rows))
    samples = []
    for stage, rows in by_stage:
        limit = max(1, _SEARCHED // len(by_stage))
        if len(rows) > limit:
            gap = (len(rows) - 1) / max(1, limit - 1)
            rows = [rows[round(i * gap)] for i in range(limit)]
        questions = questions_of((str(row["prompt"]) for row in rows), run.template_of(stage))
        samples += [
            Sample(
                stage.name,
                str(row.get("domain") or ""),
                shortened(questions[str(row["prompt"])]),
                shortened(str(row["answer"])),
                _answer(row),
            )
            for row in rows
        ]
    return samples


class _Text(NamedTuple):
    domain: str
    prompt: str
    answer: str
    thought: str
    rest: str
    tokens: str


class _WrittenDataset(NamedTuple):
    """A stage's dataset for the template.

    bars: of the kept samples, then of those removed for each reason: name, count, share, and width
        in per cent of the longest. domains: name, rows, mean tokens.
    """

    total: str
    bars: list[tuple[str, str, str, float]]
    domains: list[tuple[str, str, str]]
    texts: list[_Text]


def written_dataset(stage: StageRecord) -> _WrittenDataset | None:
    """The dataset of a stage that leaves one; None for other stages, and before its end."""
    if stage.description.leaves != "dataset" or stage.summary is None:
        return None
    samples = stage.summary.get("samples")
    counts: dict[str, int] = {"kept": 0, **samples} if isinstance(samples, Mapping) else {}
    total, largest = sum(counts.values()), max(counts.values(), default=0)
    bars = []
    for name in sorted(counts, key=lambda name: (name != "kept", -counts[name], name)):
        share = f"{100 * counts[name] / total:.1f} %" if total else "–"
        width = 100 * counts[name] / largest if largest else 0.0
        bars.append((name.replace("_", " "), f"{counts[name]:,}", share, width))
    domains = _domains(stage.summary)
    return _WrittenDataset(f"{total:,}", bars, domains, _texts(stage, stage.summary))


def _domains(summary: Summary) -> list[tuple[str, str, str]]:
    """Rows and mean tokens by domain and in all, as in DeepSeek-R1's table of its 800K set."""
    domains = summary.get("domains") or {}
    parts = [(name or "no domain", part) for name, part in domains.items()]
    if len(parts) != 1 and "rows" in summary:
        parts.append(("all", summary))
    return [
        (
            name,
            f"{part.get('rows', 0):,}",
            "–" if (mean := part.get("mean_tokens")) is None else short(mean),
        )
        for name, part in parts
    ]


def _texts(stage: StageRecord, summary: Summary) -> list[_Text]:
    """The first kept text of each domain, then further first ones."""

    def rows(limit: int) -> Iterator[JsonObject]:
        rows = islice(stage.rows("dataset.jsonl"), limit)
        return (row for row in rows if "prompt" in row and "response" in row)

    firsts: dict[str, JsonObject] = {}
    domains = len(summary.get("domains") or {})
    for row in rows(_ROWS_READ):
        firsts.setdefault(str(row.get("domain") or ""), row)
        if len(firsts) >= min(_TEXTS_SHOWN, domains):
            break
    rest = [row for row in rows(_TEXTS_SHOWN) if row not in firsts.values()]
    return [
        _Text(
            str(row.get("domain") or ""),
            shortened(str(row["prompt"])),
            shortened(str(row.get("answer") or "")),
            *_split_thought(shortened(str(row["response"]))),
            str(row.get("tokens", "")),
        )
        for row in [*firsts.values(), *rest][:_TEXTS_SHOWN]
    ]
