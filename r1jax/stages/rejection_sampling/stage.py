"""Rejection sampling: sample, keep what is right and readable, and write it as a dataset.

The cold start (sampled from R1-Zero, rewritten) and the 600K reasoning samples (sampled from the
first RL checkpoint) of DeepSeek-R1, arXiv 2501.12948, sections 2.3.1 and 2.3.3.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import jax
from rich.console import Console

from r1jax.data.chat_template import render_prompt
from r1jax.data.dataset_files import (
    DatasetRow,
    Provenance,
    dataset_card,
    write_dataset,
    write_tfds,
)
from r1jax.data.decontamination import EvaluationNgrams, duplicate_key
from r1jax.data.prompts import Prompt
from r1jax.data.rewriting import Draft, check_rules
from r1jax.data.tokenizers import encode_texts
from r1jax.files import JsonObject, read_rows, write_text
from r1jax.programs import Planning, SlotRollout, StagePrograms, sampling_programs
from r1jax.programs.program import longest_prompt
from r1jax.programs.rollout import planned_lengths, search_programs
from r1jax.rewards.filters import TextFilter, apply_filters, load_filters
from r1jax.rollouts.scored_samples import SAMPLES, store_scored_samples
from r1jax.rollouts.scoring import check_example_domains
from r1jax.rollouts.searching import check_search, store_searches
from r1jax.run.resolve import ResolvedRun, StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.stop import RunError
from r1jax.settings.data import DataSection
from r1jax.settings.rewriting import RuleRewrite
from r1jax.stages.rejection_sampling.rewriting import rewrite
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage

DATASET = "dataset.jsonl"
KEPT = "kept"


def check(stage: RejectionSamplingStage, run: ResolvedRun) -> None:
    """Filters and a rewriting rule can be used; every prompt has a reward."""
    try:
        load_filters(stage.filters)
        if isinstance(stage.rewrite, RuleRewrite):
            check_rules(stage.rewrite)
    except ValueError as error:
        raise ValueError(f"stages.{stage.name}: {error}") from error
    if stage.model_rewrite is not None:
        with run.config.blaming("stages", stage.name, "rewrite"):
            data = DataSection(source="jsonl:-", template=stage.model_rewrite.template)
            tokenizer = run.models.of(stage.model_rewrite.weights).tokenizer
            render_prompt("", data, tokenizer)
    check_example_domains(stage, run, stage.prompts)
    check_search(stage, stage.dataset_search(), run)


def run(stage: RejectionSamplingStage, run: StageRun) -> None:
    """Sample or search, resuming behind the last whole batch; then choose, and write the dataset.

    `summary.json` says how many samples each reason removed, and rows and tokens by domain.
    """
    filters, seed = load_filters(stage.filters), seed_of(run.config.seed, stage.name)
    if (search := stage.dataset_search()) is None:
        clock, prompts = store_scored_samples(stage, run, stage.dataset_sampling(), seed, "right")
    else:
        clock, prompts = store_searches(stage, run, search, seed, "right")
    by_id = {prompt.id: prompt for prompt in prompts}
    counts: Counter[str] = Counter()
    kept: list[JsonObject] = []
    for row, reason in choose(
        read_rows(run.directory / SAMPLES),
        by_id,
        filters=filters,
        evaluation=EvaluationNgrams.of(
            example.prompt
            for data in stage.decontaminate
            for part in run.datasets.parts(data)
            for example in run.datasets.examples(part)
        ),
        keep_per_prompt=stage.keep_per_prompt,
    ):
        counts[reason or KEPT] += 1
        if reason is None:
            kept.append(row)
    clock.lap("choose")
    drafts = [
        Draft(prompt.question, prompt.prefill + row["completion"], row["extracted"] or "")
        for row, prompt in ((row, by_id[row["problem_id"]]) for row in kept)
    ]
    try:
        texts = rewrite(stage, run, drafts)
    finally:  # a rewriting that is stopped took its time, too
        clock.lap("rewrite")
        run.record.mark(stage, "running", clock.seconds)
    rows = [
        _dataset_row(row, by_id[row["problem_id"]], text, stage, run)
        for row, text in zip(kept, texts, strict=True)
        if text is not None
    ]
    counts[KEPT], lost = len(rows), len(kept) - len(rows)
    if lost:
        counts["rewrite"] = lost
    if not rows:
        raise RunError(
            f"{stage.name}: no sample is left ({summary_line(counts)}). Weaken what removes most, "
            "sample more often, or take better weights; the samples are in "
            f"{run.files.home(run.directory / SAMPLES)}"
        )
    if jax.process_index() == 0:
        path = run.directory / DATASET
        write_dataset(path, rows)
        name = re.sub(r"[^a-z0-9]+", "_", f"r1jax_{run.config.name}_{stage.name}".lower())
        write_tfds(path, run.directory / "tfds", name.strip("_"))
        summary = {"samples": dict(counts), **dataset_card(rows)}
        write_text(run.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
        line = f"{stage.name}: {summary_line(counts)}"
        Console(highlight=False).print(line, markup=False)
    run.files.wait_for_files(stage.name)
    clock.lap("write")
    run.record.mark(stage, "done", clock.seconds)


def choose(
    rows: Iterable[JsonObject],
    prompts: Mapping[int, Prompt],
    *,
    filters: Mapping[str, TextFilter],
    evaluation: EvaluationNgrams,
    keep_per_prompt: int,
) -> Iterator[tuple[JsonObject, str | None]]:
    """Each sample with the reason why it is not kept, or None.

    The reasons, in the order in which they are looked for: `contaminated` (the question is one of
    the evaluation's), `truncated`, the judgement (`wrong`, `unparseable`, `verifier_failed`),
    `blank`, `filter NAME`, `duplicate` (the same text was kept for the same question, wherever
    that stands in the data) and `surplus` (the prompt has `keep_per_prompt` already).

    Args:
      rows: of samples.jsonl; of a prompt's samples the first ones that pass are kept, which is a
        random choice, as samples are independent.
      prompts: by `problem_id`.
    """
    kept: Counter[int] = Counter()
    seen: set[tuple[str, str]] = set()
    contaminated: dict[int, bool] = {}
    for row in rows:
        key = row["problem_id"]
        prompt = prompts[key]
        if key not in contaminated:
            contaminated[key] = evaluation.overlaps(prompt.question)
        text = prompt.prefill + row["completion"]
        same = (prompt.question, duplicate_key(text))
        if contaminated[key]:
            yield row, "contaminated"
        elif row["finish_reason"] == "length":
            yield row, "truncated"
        elif row["outcome"] != "right":
            yield row, row["outcome"]
        elif not text.strip():
            yield row, "blank"
        elif (refused := apply_filters(text, filters)) is not None:
            yield row, f"filter {refused}"
        elif same in seen:
            yield row, "duplicate"
        elif kept[key] == keep_per_prompt:
            yield row, "surplus"
        else:
            kept[key] += 1
            seen.add(same)
            yield row, None


def summary_line(counts: Mapping[str, int]) -> str:
    """`12 kept of 64: 40 wrong, 8 filter repetition, ...`, the commonest reason first."""
    removed = {reason: count for reason, count in counts.items() if reason != KEPT}
    reasons = sorted(removed.items(), key=lambda item: (-item[1], item[0]))
    text = f"{counts.get(KEPT, 0)} kept of {sum(counts.values())}"
    return f"{text}: {', '.join(f'{count} {reason}' for reason, count in reasons)}".rstrip(": ")


def _dataset_row(
    row: JsonObject, prompt: Prompt, text: str, stage: RejectionSamplingStage, run: StageRun
) -> DatasetRow:
    """A kept sample, perhaps rewritten, as a row of dataset.jsonl with where it comes from."""
    tokens = row["length"]
    if stage.rewrite is not None:
        tokens = len(encode_texts([text], run.models.of(stage.name).tokenizer)[0])
    return DatasetRow(
        prompt=prompt.question,
        response=text,
        answer=prompt.answer,
        domain=prompt.domain,
        tokens=tokens,
        reward=row["reward"],
        provenance=Provenance(
            checkpoint=run.config.weights_of(stage.name),
            stage=stage.name,
            seed=run.config.seed,
            step=row["step"],
            sample_index=row["sample"],
            problem_id=row["problem_id"],
            sampling={
                name: ", ".join(value) if isinstance(value, list) else value
                for name, value in stage.sampling.model_dump(mode="json").items()
            },
            versions=run.record.content["versions"],
            rewriter=None if stage.rewrite is None else stage.rewrite.kind,
        ),
    )


def programs(stage: RejectionSamplingStage, planning: Planning) -> StagePrograms:
    """The sampler, reward models, and the sampler of a rewriter."""
    if (search := stage.dataset_search()) is not None:
        sampling = search_programs(stage, planning, search)
    else:
        sampling = sampling_programs(stage, planning, stage.dataset_sampling())
    rewrite = stage.model_rewrite
    if rewrite is None:
        return sampling
    # It reads a question and an answer, each as long as may be, and is alone in memory.
    rewriter = SlotRollout(
        planning.sampler_of(rewrite.weights),
        rewrite.drafts_per_batch,
        1,
        longest_prompt(stage, planning.config) + stage.max_new_tokens,
        rewrite.max_new_tokens,
        rewrite.sampling,
        planned_lengths(None, rewrite.max_new_tokens),
    )
    rewriting = rewriter.programs({}, 0.0, "rewrite: ")
    return replace(sampling, programs=(*sampling.programs, *rewriting))
