"""Labels of steps by rollouts (Math-Shepherd, Wang et al. 2023, arXiv 2312.08935, section 3).

A step is as good as its continuations: each beginning of a solution, up to the end of a step, is
continued several times, and the rewards say which continuations come out right. Or the solutions
are those of a search, and the continuations of a step those that its tree holds.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

import jax
import numpy as np
from rich.console import Console

from r1jax.data.examples import row_label
from r1jax.data.prompts import Prompt
from r1jax.data.steps import TokenSteps, cut_steps
from r1jax.data.tokenizers import encode_texts
from r1jax.files import JsonObject, encode_line, read_rows, write_text, written_whole
from r1jax.metrics.recorder import Recorder
from r1jax.programs import Planning, SlotRollout, StagePrograms, sampling_programs
from r1jax.programs.program import longest_prompt
from r1jax.programs.rollout import (
    planned_lengths,
    reward_model_weights,
    reward_models,
    search_programs,
)
from r1jax.rollouts.sampling import Completion, generate_options
from r1jax.rollouts.scored_samples import (
    SAMPLES,
    ScoredParts,
    store_scored_parts,
    store_scored_samples,
)
from r1jax.rollouts.scoring import check_domains, check_example_domains, reward_scorer
from r1jax.rollouts.searching import TREES, check_search, store_searches
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.stop import RunError
from r1jax.sampler import Finish
from r1jax.search.tree import path_of
from r1jax.settings.section import SettingError
from r1jax.stages.step_labels.settings import StepLabelsStage

DATASET = "dataset.jsonl"
CONTINUATIONS = "continuations"
_LARGEST_SAMPLE = 2**31 - 1


def check(stage: StepLabelsStage, run: ResolvedRun) -> None:
    """Every prompt has a reward, given solutions are there, and indices of samples are int32."""
    check_example_domains(stage, run, stage.prompts)
    check_search(stage, stage.dataset_search(), run)
    with run.config.blaming("stages", stage.name):
        solutions = stage.solutions_per_prompt if stage.solutions == "sampled" else 1
        if solutions * stage.max_new_tokens * stage.continuations > _LARGEST_SAMPLE:
            raise SettingError(
                "continuations",
                "solutions_per_prompt x max_new_tokens x continuations is the number of samples "
                f"that a prompt may have, at most {_LARGEST_SAMPLE}; lower one of them",
            )
        if stage.solutions == "given" and run.config.data[stage.data].mixture:
            raise SettingError("data", "given solutions are those of one dataset, of no mixture")
    if stage.solutions == "given" and not run.config.source_stages(stage.data):
        with run.config.blaming("data", stage.data, reader=stage.name):
            _check_responses(stage, run)


def run(stage: StepLabelsStage, run: StageRun) -> None:
    """Sample solutions and continuations, resuming behind the last whole queue; then write labels.

    The solutions are in `samples.jsonl`, the continuations in `continuations/samples.jsonl`, in the
    order of solutions and steps.
    """
    seed = seed_of(run.config.seed, stage.name)
    if (search := stage.dataset_search()) is not None:
        clock, prompts = store_searches(stage, run, search, seed, "right")
        _write(stage, run, *_of_searches(stage, run, {prompt.id: prompt for prompt in prompts}))
        clock.lap("write")
        run.record.mark(stage, "done", clock.seconds)
        return
    if stage.solutions == "sampled":
        _, prompts = store_scored_samples(stage, run, stage.dataset_sampling(), seed, "right")
    else:
        prompts = _score_given(stage, run)
    solutions, counts = _solutions(stage, run, {prompt.id: prompt for prompt in prompts})
    _check_some(stage, run, counts)
    beginnings = [each for solution in solutions for each in solution.beginnings(stage)]
    options = generate_options(
        run.models.sampler_of(stage.name),
        stage.sampling,
        samples=stage.continuations,
        max_new_tokens=stage.max_new_tokens,
        seed=seed_of(run.config.seed, stage.name, CONTINUATIONS),
    )
    parts = ScoredParts(
        beginnings,
        options,
        stage.beginnings_per_batch,
        run.directory / CONTINUATIONS,
        "right",
        left_out=("prompt", "answer"),  # those of the solution, again and again
    )
    report = f"{len(solutions)} solutions, {len(beginnings)} steps to continue"
    clock = store_scored_parts(stage, run, parts, report)
    _write(stage, run, _labelled_rows(stage, run, solutions), counts)
    clock.lap("write")
    run.record.mark(stage, "done", clock.seconds)


@dataclass(frozen=True)
class _Solution:
    """A solution of a prompt, in its steps.

    row: of samples.jsonl. token_ids: of the completion. counts: of its tokens, how many hold the
    beginning up to the end of each step but the last.
    """

    prompt: Prompt
    row: JsonObject
    steps: Sequence[str]
    token_ids: Sequence[int]
    counts: Sequence[int]
    texts: Sequence[str]

    def beginnings(self, stage: StepLabelsStage) -> Iterator[tuple[Prompt, int]]:
        """What is continued: prompts that end with each step but the last.

        The samples of a prompt are numbered by solution, step and continuation, so that the random
        numbers of each depend on nothing else.
        """
        for step, (count, text) in enumerate(zip(self.counts, self.texts, strict=True)):
            number = self.row["sample"] * stage.max_new_tokens + step
            beginning = replace(
                self.prompt,
                text=self.prompt.text + text,
                prefill=self.prompt.prefill + text,
                token_ids=np.asarray([*self.prompt.token_ids, *self.token_ids[:count]], np.int32),
            )
            yield beginning, number * stage.continuations


def _solutions(
    stage: StepLabelsStage, run: StageRun, prompts: Mapping[int, Prompt]
) -> tuple[list[_Solution], Counter[str]]:
    """The solutions that ended, and how many were kept and left out, and why."""
    tokenizer = run.models.of(stage.name).tokenizer
    cutter = TokenSteps(tokenizer, stage.step_rule)
    solutions, counts = list[_Solution](), Counter[str](kept=0)
    for row in read_rows(run.directory / SAMPLES):
        prompt, completion = prompts[row["problem_id"]], row["completion"]
        steps = cut_steps(prompt.prefill + completion, stage.step_rule)
        if row["finish_reason"] == "length":
            counts["truncated"] += 1
        elif not steps:
            counts["without a step"] += 1
        elif len(steps) > stage.max_new_tokens:
            counts["of too many steps"] += 1
        elif cutter.decode(ids := encode_texts([completion], tokenizer)[0]) != completion:
            counts["changed by the tokenizer"] += 1
        else:
            counts["kept"] += 1
            # Steps of the prefilled beginning alone end before the first token.
            lengths = np.cumsum([len(step) for step in steps[:-1]], dtype=int)
            offsets = [max(0, int(x) - len(prompt.prefill)) for x in lengths]
            ends = cutter.counts(ids, offsets)
            texts = [cutter.decode(ids[:count]) for count in ends]
            solutions.append(_Solution(prompt, row, steps, ids, ends, texts))
    return solutions, counts


def _check_some(stage: StepLabelsStage, run: StageRun, counts: Counter[str]) -> None:
    """Raises RunError where no solution was kept."""
    if not counts["kept"]:
        raise RunError(
            f"{stage.name}: no solution has a step to label "
            f"({', '.join(f'{n} {why}' for why, n in counts.items())}); raise max_new_tokens, or "
            f"look at {run.files.home(run.directory / SAMPLES)}"
        )


def _of_searches(
    stage: StepLabelsStage, run: StageRun, prompts: Mapping[int, Prompt]
) -> tuple[list[JsonObject], Counter[str]]:
    """Labelled solutions of searches, and how many were kept and left out, and why.

    The label of a step is that of the solutions behind it, each as often as it was sampled (as
    Zhang et al. 2024, arXiv 2406.03816, estimate it from a tree).
    """
    rows, counts = list[JsonObject](), Counter[str](kept=0)
    samples = read_rows(run.directory / SAMPLES)
    for tree in read_rows(run.directory / TREES):
        nodes, solved = tree["nodes"], list(islice(samples, len(tree["solutions"])))
        outcomes: dict[int, list[str]] = {}
        for node, row in zip(tree["solutions"], solved, strict=True):
            if nodes[node]["state"] == "complete":
                for each in path_of(nodes, node):
                    outcomes.setdefault(each, []).extend([row["outcome"]] * nodes[node]["samples"])
        prompt, kept = prompts[tree["problem_id"]], 0
        for node, row in zip(tree["solutions"], solved, strict=True):
            path = path_of(nodes, node)
            text = prompt.prefill + row["completion"]
            steps = cut_steps(text, stage.step_rule)
            if nodes[node]["state"] != "complete":
                counts["truncated"] += 1
            elif not steps:
                counts["without a step"] += 1
            elif "".join(nodes[each]["text"] for each in path) != row["completion"]:
                counts["changed by the tokenizer"] += 1
            elif kept == stage.solutions_per_prompt:
                counts["surplus"] += 1
            else:
                kept += 1
                counts["kept"] += 1
                lengths = list(accumulate(len(nodes[each]["text"]) for each in path))
                ends = accumulate(len(step) for step in steps)
                # Of each step the first beginning that holds all of it.
                holding = [
                    path[min(bisect_left(lengths, end - len(prompt.prefill)), len(path) - 1)]
                    for end in ends
                ]
                labelled = [outcomes[each] for each in holding]
                rows.append(_labelled_row(stage, run, prompt, row, steps, labelled))
    _check_some(stage, run, counts)
    return rows, counts


def _write(
    stage: StepLabelsStage, run: StageRun, rows: Iterable[JsonObject], counts: Counter[str]
) -> None:
    """Process 0 writes the dataset and `summary.json`; the others wait for it."""
    if jax.process_index() == 0:
        _write_dataset(stage, run, rows, counts)
    run.files.wait_for_files(stage.name)


def _write_dataset(
    stage: StepLabelsStage, run: StageRun, rows: Iterable[JsonObject], counts: Counter[str]
) -> None:
    solutions, steps, right, domains = counts["kept"], 0, 0.0, dict[str, Counter[str]]()
    with written_whole(run.directory / DATASET) as partial, partial.open("wb") as file:
        for row in rows:
            known = [label for label in row["labels"] if label is not None]
            steps, right = steps + len(known), right + sum(known)
            of_domain = domains.setdefault(row["domain"], Counter())
            of_domain.update(rows=1, tokens=row["tokens"])
            file.write(encode_line(row))
    total = sum(each["tokens"] for each in domains.values())
    summary = {
        "samples": dict(counts),
        "rows": solutions,
        "mean_tokens": total / solutions,
        "domains": {
            name: {"rows": each["rows"], "mean_tokens": each["tokens"] / each["rows"]}
            for name, each in sorted(domains.items())
        },
        "labelled_steps": steps,
        "mean_label": right / steps if steps else None,
    }
    write_text(run.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    line = f"{stage.name}: {steps} steps of {solutions} solutions are labelled"
    line += f", {right / steps:.1%} right" if steps else ""
    Console(highlight=False).print(line, markup=False)


def _labelled_rows(
    stage: StepLabelsStage, run: StageRun, solutions: Sequence[_Solution]
) -> Iterator[JsonObject]:
    """The rows of the dataset; `completions` are the steps, with their separators."""
    continuations = read_rows(run.directory / CONTINUATIONS / SAMPLES)
    for solution in solutions:
        outcomes = [
            [row["outcome"] for row in islice(continuations, stage.continuations)]
            for _ in solution.counts
        ]
        # The last step has the answer: nothing is left to continue.
        outcomes.append([solution.row["outcome"]])
        yield _labelled_row(stage, run, solution.prompt, solution.row, solution.steps, outcomes)


def _labelled_row(
    stage: StepLabelsStage,
    run: StageRun,
    prompt: Prompt,
    row: JsonObject,
    steps: Sequence[str],
    outcomes: Sequence[Sequence[str]],
) -> JsonObject:
    """The row of a solution; outcomes: of each step, of what followed it."""
    return {
        "prompt": prompt.question,
        "completions": list(steps),
        "labels": [step_label(each, soft=stage.label == "soft") for each in outcomes],
        "response": prompt.prefill + row["completion"],
        "answer": prompt.answer,
        "domain": prompt.domain,
        "tokens": row["length"],
        "outcome": row["outcome"],
        "right": [each.count("right") for each in outcomes],
        "scored": [len(each) - each.count("verifier_failed") for each in outcomes],
        "provenance": {
            "checkpoint": run.config.weights_of(stage.name),
            "stage": stage.name,
            "seed": run.config.seed,
            "problem_id": row["problem_id"],
            "sample_index": row["sample"],
        },
    }


def step_label(outcomes: Sequence[str], *, soft: bool) -> float | bool | None:
    """The label of a step whose continuations came out so; those that the verifier failed on do not
    count, and without any other there is none.

    Soft, it is the share of right ones; hard, whether there is a right one (arXiv 2312.08935,
    section 3, "soft estimation" and "hard estimation").
    """
    scored = len(outcomes) - outcomes.count("verifier_failed")
    if not scored:
        return None
    right = outcomes.count("right")
    return right / scored if soft else right > 0


def _check_responses(stage: StepLabelsStage, run: ResolvedRun) -> None:
    """Raises SettingError for a row without a response."""
    examples = run.datasets.examples(stage.data)
    for index in range(min(len(examples), stage.prompts or len(examples))):
        if not (examples[index].response or "").strip():
            section = run.datasets.section(stage.data)
            raise SettingError(
                "fields.response",
                f"{row_label(section, examples[index].id)} has no response, and stages."
                f"{stage.name}.solutions = 'given'; map it with fields: {{response: COLUMN}}, or "
                "set solutions to sampled",
            )


def _score_given(stage: StepLabelsStage, run: StageRun) -> list[Prompt]:
    """Score the dataset's responses, and store them as samples; gives the prompts."""
    sampler = run.models.sampler_of(stage.name)
    with run.config.blaming("data", stage.data, reader=stage.name):
        _check_responses(stage, run)
    prompts, report = run.datasets.prompts(stage.data, sampler.tokenizer, stage.prompts)
    check_domains(stage, {prompt.domain: stage.data for prompt in prompts}, run.config)
    responses = {each.id: each.response or "" for each in run.datasets.examples(stage.data)}
    texts = [responses[prompt.id].removeprefix(prompt.prefill) for prompt in prompts]
    completions = [
        Completion(prompt, 0, np.asarray(ids), np.zeros(len(ids)), Finish.EOS, text)
        for prompt, text, ids in zip(
            prompts, texts, encode_texts(texts, sampler.tokenizer), strict=True
        )
    ]
    with (
        Recorder(run.directory, process_index=jax.process_index()) as recorder,
        reward_scorer(run.config.rewards_of(stage), run) as scorer,
    ):
        recorder.rewind({})
        scores = scorer.submit(completions).result()
        pairs = zip(completions, scores, strict=True)
        recorder.log_samples(completion.row(score, step=0) for completion, score in pairs)
    run.files.wait_for_files(f"{stage.name} {report}")
    return prompts


def programs(stage: StepLabelsStage, planning: Planning) -> StagePrograms:
    """The samplers of solutions and of continuations, and the scoring of reward models."""
    if (search := stage.dataset_search()) is not None:
        return search_programs(stage, planning, search)
    sampling = sampling_programs(stage, planning, stage.dataset_sampling())
    # A solution's beginning is at most as long as the solution.
    rollout = SlotRollout(
        planning.sampler_of(stage.name),
        stage.beginnings_per_batch,
        stage.continuations,
        longest_prompt(stage, planning.config) + stage.max_new_tokens,
        stage.max_new_tokens,
        stage.sampling,
        planned_lengths(stage.lengths, stage.max_new_tokens),
    )
    resident = reward_model_weights(reward_models(stage, planning))
    continuing = rollout.programs(resident, 0.0, "continuations: ")
    return replace(sampling, programs=(*sampling.programs, *continuing))
