"""Rejection sampling: sample, keep what is right and readable, and write it as a dataset.

The cold start (sampled from R1-Zero, rewritten) and the 600K reasoning samples (sampled from the
first RL checkpoint) of DeepSeek-R1, arXiv 2501.12948, sections 2.3.1 and 2.3.3.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from r1jax.data import Example, Prompt, encode_prompt
from r1jax.data.dataset_files import (
    DatasetRow,
    Provenance,
    dataset_card,
    write_dataset,
    write_tfds,
)
from r1jax.data.decontamination import EvaluationNgrams, duplicate_key
from r1jax.data.rewriting import (
    INSTRUCTION,
    Draft,
    EndpointError,
    EndpointRewriter,
    Reply,
    RewriteLog,
    RuleRewriter,
    Stopped,
    instruction_prompt,
)
from r1jax.data.tokenizers import encode_texts
from r1jax.files import read_rows
from r1jax.metrics import HEARTBEAT, span
from r1jax.processes import any_process, from_process_zero, gather, process_batch_slice
from r1jax.rewards.filters import TextFilter, apply_filters, load_filters
from r1jax.rollouts.sampling import sample_batch, stop_search, to_sampling
from r1jax.rollouts.scored_samples import SAMPLES, judge_samples, share_right, slice_of_process
from r1jax.run.context import Context, Preempted, RunError
from r1jax.sampler import Finish, GenerateOptions
from r1jax.settings.data import DataSection
from r1jax.stages.rejection_sampling.settings import (
    EndpointRewrite,
    ModelRewrite,
    RejectionSamplingStage,
    RuleRewrite,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASET = "dataset.jsonl"
REWRITTEN = "rewritten.jsonl"
KEPT = "kept"

_GLANCE = 1.0  # seconds between two looks whether to stop
_PUSH_EVERY = 60.0  # seconds after which replies of an endpoint are on a run's bucket

Row = Mapping[str, Any]


def run_rejection_sampling(
    stage: RejectionSamplingStage, context: Context, directory: Path
) -> None:
    """Sample and judge, resuming behind the last whole batch; then choose, and write the dataset.

    Leaves `samples.jsonl` (every sample), `dataset.jsonl` (what was kept) and `summary.json` (how
    many samples each reason removed, and rows and tokens by domain).
    """
    filters = load_filters(stage.filters)
    clock, prompts = judge_samples(
        stage,
        context,
        directory,
        limit=stage.prompts,
        samples=stage.samples_per_prompt,
        batch=stage.prompts_per_batch,
        seed=context.seed(stage.name),
        progress_figures=lambda rows: {"right": share_right(rows)},
    )
    asked = {prompt.id: prompt for prompt in prompts}
    counts: Counter[str] = Counter()
    kept: list[Row] = []
    for row, reason in choose(
        read_rows(directory / SAMPLES),
        asked,
        filters=filters,
        evaluation=evaluation_ngrams(context, stage.decontaminate),
        keep_per_prompt=stage.keep_per_prompt,
    ):
        counts[reason or KEPT] += 1
        if reason is None:
            kept.append(row)
    clock.lap("choose")
    drafts = [draft(row, asked[row["problem_id"]]) for row in kept]
    try:
        texts = rewrite(stage, context, directory, drafts)
    finally:  # a rewriting that is stopped took its time, too
        clock.lap("rewrite")
        context.mark(stage.name, stage.kind, "running", clock.seconds)
    tokenizer = context.model_of(stage.name).tokenizer
    rows = [
        dataset_row(row, asked[row["problem_id"]], text, stage, context, tokenizer)
        for row, text in zip(kept, texts, strict=True)
        if text is not None
    ]
    counts[KEPT], lost = len(rows), len(kept) - len(rows)
    if lost:
        counts["rewrite"] = lost
    if not rows:
        raise RunError(
            f"{stage.name}: no sample is left ({told(counts)}). Weaken what removes most, sample "
            f"more often, or take better weights; the samples are in "
            f"{context.home(directory / SAMPLES)}"
        )
    if jax.process_index() == 0:
        write_dataset(directory / DATASET, rows)
        name = re.sub(r"[^a-z0-9]+", "_", f"r1jax_{context.config.name}_{stage.name}".lower())
        write_tfds(directory / DATASET, directory / "tfds", name.strip("_"))
        summary = {"samples": dict(counts), **dataset_card(rows)}
        (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        Console(highlight=False).print(f"{stage.name}: {told(counts)}", markup=False)
    context.wait_for_files(stage.name)
    clock.lap("write")
    context.mark(stage.name, stage.kind, "done", clock.seconds)


def check_texts(stage: RejectionSamplingStage) -> None:
    """Raises ValueError for filters or a rewriting rule that the stage could not use later."""
    try:
        load_filters(stage.filters)
        if isinstance(stage.rewrite, RuleRewrite):
            RuleRewriter(**stage.rewrite.model_dump(exclude={"kind"}))
    except ValueError as error:
        raise ValueError(f"stages.{stage.name}: {error}") from error


def evaluation_ngrams(context: Context, datasets: Iterable[str]) -> EvaluationNgrams:
    """The 10-grams of the questions of these datasets, mixtures included."""
    return EvaluationNgrams.of(
        example.prompt
        for data in datasets
        for part in context.config.data[data].mixture or [data]
        for example in context.examples(part)
    )


def choose(
    rows: Iterable[Row],
    prompts: Mapping[int, Prompt],
    *,
    filters: Mapping[str, TextFilter],
    evaluation: EvaluationNgrams,
    keep_per_prompt: int,
) -> Iterator[tuple[Row, str | None]]:
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


def told(counts: Mapping[str, int]) -> str:
    """`12 kept of 64: 40 wrong, 8 filter repetition, ...`, the commonest reason first."""
    removed = {reason: count for reason, count in counts.items() if reason != KEPT}
    reasons = sorted(removed.items(), key=lambda item: (-item[1], item[0]))
    text = f"{counts.get(KEPT, 0)} kept of {sum(counts.values())}"
    return f"{text}: {', '.join(f'{count} {reason}' for reason, count in reasons)}".rstrip(": ")


def draft(row: Row, prompt: Prompt) -> Draft:
    """A kept sample as a rewriter sees it."""
    return Draft(prompt.question, prompt.prefill + row["completion"], row["extracted"] or "")


@span("rewrite")
def rewrite(
    stage: RejectionSamplingStage, context: Context, directory: Path, drafts: Sequence[Draft]
) -> list[str | None]:
    """The texts to train on, in order; None where the rewriter had none to give.

    Without a rewriter they are the completions themselves. Only process 0 asks an endpoint.
    """
    section = stage.rewrite
    if section is None:
        return [each.completion for each in drafts]
    if isinstance(section, RuleRewrite):
        options = section.model_dump(exclude={"kind"})
        return RuleRewriter(**options).rewrite(drafts)
    if isinstance(section, EndpointRewrite):
        return rewrite_with_endpoint(section, stage, context, directory, drafts)
    return rewrite_with_model(section, stage, context, directory, drafts)


def rewrite_with_endpoint(
    section: EndpointRewrite,
    stage: RejectionSamplingStage,
    context: Context,
    directory: Path,
    drafts: Sequence[Draft],
) -> list[str | None]:
    """Process 0 asks, in a thread; meanwhile all processes look together whether to stop."""
    abandoned = threading.Event()
    pushed = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        asking: Future[list[str | None]] | None = None
        try:
            if jax.process_index() == 0:
                given = section.model_dump(exclude={"kind"})
                options = {name: value for name, value in given.items() if value is not None}
                rewriter = EndpointRewriter(
                    log=RewriteLog(directory / REWRITTEN),
                    stop_requested=lambda: context.stop_requested or abandoned.is_set(),
                    **options,
                )
                asking = thread.submit(rewriter.rewrite, drafts)
            while any_process(asking is not None and bool(wait([asking], _GLANCE).not_done)):
                context.stop_requested = any_process(context.stop_requested)
                HEARTBEAT.beat()  # the requests have deadlines of their own
                if time.monotonic() - pushed > _PUSH_EVERY:
                    context.push()
                    pushed = time.monotonic()
        except BaseException:
            abandoned.set()
            raise
    texts: list[str | None] = []
    failure = stopped = None
    if asking is not None:
        try:
            texts = asking.result()
        except EndpointError as error:  # the other processes wait to be told
            failure = str(error)
        except Stopped as stop:
            stopped = str(stop)
    failure, stopped, *texts = from_process_zero([failure, stopped, *texts])
    if failure is not None:
        raise RunError(f"{stage.name}: {failure}")
    if stopped is not None:
        raise Preempted(f"{stage.name}: {stopped}")
    return texts


def rewrite_with_model(
    section: ModelRewrite,
    stage: RejectionSamplingStage,
    context: Context,
    directory: Path,
    drafts: Sequence[Draft],
) -> list[str | None]:
    """Ask a model of the run, one completion for each draft, going on behind the last whole batch.

    Process 0 keeps the replies of a batch before the next one is asked for.
    """
    model = context.sampler_of(section.weights)
    share = process_batch_slice(context.rollout_layout)
    data = DataSection(source="jsonl:-", template=section.template)
    instruction = section.instruction or INSTRUCTION
    prompts = [
        encode_prompt(
            Example(id=i, prompt=instruction_prompt(each, instruction), answer=""),
            data,
            model.tokenizer,
        )
        for i, each in enumerate(drafts)
    ]
    # A draft's place is part of its noise, so equal drafts may get unlike replies.
    settings = section.model_dump(mode="json", exclude={"style"})
    keys = [RewriteLog.key(each, {**settings, "place": i}) for i, each in enumerate(drafts)]
    log = RewriteLog(directory / REWRITTEN) if jax.process_index() == 0 else None
    known = [None if log is None or key not in log else astuple(log[key]) for key in keys]
    replies = [None if each is None else Reply(*each) for each in from_process_zero(known)]
    params = None
    for start in range(0, len(prompts), section.drafts_per_batch):
        batch = slice(start, start + section.drafts_per_batch)
        if None not in replies[batch]:
            continue
        if any_process(context.stop_requested):
            raise Preempted(f"{stage.name}: {start} of {len(prompts)} drafts are rewritten")
        if params is None:
            params = context.weights(section.weights, model)
        asked = prompts[batch]
        own = slice_of_process(asked, section.drafts_per_batch, share)
        completions = sample_batch(
            params,
            own or asked[-1:],
            model.decoder,
            model.tokenizer,
            GenerateOptions(
                samples=1,
                max_new_tokens=section.max_new_tokens,
                seed=context.seed(stage.name, "rewrite"),
                sampling=to_sampling(section.sampling),
                eos_ids=model.eos_ids,
                stop=stop_search(model.tokenizer, section.sampling),
                speculative=section.sampling.speculative,
            ),
            rows=section.drafts_per_batch // share.count,
        )[: len(own)]
        written = [(c.prompt.prefill + c.text, c.finish == Finish.LENGTH) for c in completions]
        replies[batch] = [Reply(*each) for each in gather(written, context.rollout_layout)]
        if log is not None:
            for key, reply in zip(keys[batch], replies[batch], strict=True):
                assert reply is not None
                log.add(key, reply)
            context.push()
    return [
        None if reply is None else reply.accepted(each, section.style)
        for each, reply in zip(drafts, replies, strict=True)
    ]


def dataset_row(
    row: Row,
    prompt: Prompt,
    text: str,
    stage: RejectionSamplingStage,
    context: Context,
    tokenizer: PreTrainedTokenizerBase,
) -> DatasetRow:
    """A kept sample, perhaps rewritten, as a row of dataset.jsonl with where it comes from."""
    return DatasetRow(
        prompt=prompt.question,
        response=text,
        answer=prompt.answer,
        domain=prompt.domain,
        tokens=row["length"] if stage.rewrite is None else len(encode_texts([text], tokenizer)[0]),
        reward=row["reward"],
        provenance=Provenance(
            checkpoint=context.config.weights_of(stage.name),
            stage=stage.name,
            seed=context.config.seed,
            step=row["step"],
            sample_index=row["sample"],
            problem_id=row["problem_id"],
            sampling={
                name: ", ".join(value) if isinstance(value, list) else value
                for name, value in stage.sampling.model_dump(mode="json").items()
            },
            versions=context.record["versions"],
            rewriter=None if stage.rewrite is None else stage.rewrite.kind,
        ),
    )
