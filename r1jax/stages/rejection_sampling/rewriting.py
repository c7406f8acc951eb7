"""Kept completions as texts to train on: as they are, or rewritten by rule, endpoint or model."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple

import jax

from r1jax.data.example import Example
from r1jax.data.prompts import encode_prompt
from r1jax.data.rewriting import (
    INSTRUCTION,
    Draft,
    EndpointError,
    EndpointRewriter,
    Reply,
    RewriteLog,
    Stopped,
    instruction_prompt,
    rewrite_by_rules,
)
from r1jax.metrics.heartbeat import HEARTBEAT, span
from r1jax.processes import any_process, from_process_zero, gather, process_batch_slice
from r1jax.rollouts.sampling import (
    QUEUE_BATCHES,
    generate_options,
    sample_prompts,
    whole_batches,
)
from r1jax.rollouts.scored_samples import slice_of_process
from r1jax.run.resolve import StageRun
from r1jax.run.seeds import seed_of
from r1jax.run.stop import Preempted, RunError
from r1jax.sampler import Finish
from r1jax.settings.data import DataSection
from r1jax.settings.rewriting import EndpointRewrite, ModelRewrite, RuleRewrite
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage

REWRITTEN = "rewritten.jsonl"

_LOOK_EVERY = 1.0  # seconds between two looks whether to stop
_PUSH_EVERY = 60.0  # seconds after which replies of an endpoint are on a run's bucket


@span("rewrite")
def rewrite(
    stage: RejectionSamplingStage, run: StageRun, drafts: Sequence[Draft]
) -> list[str | None]:
    """The texts to train on, in order; None where the rewriter had none to give.

    Without a rewriter they are the completions themselves.
    """
    section = stage.rewrite
    if section is None:
        return [each.completion for each in drafts]
    if isinstance(section, RuleRewrite):
        return rewrite_by_rules(section, drafts)
    if isinstance(section, EndpointRewrite):
        return _rewrite_with_endpoint(section, stage, run, drafts)
    return _rewrite_with_model(section, stage, run, drafts)


def _rewrite_with_endpoint(
    section: EndpointRewrite,
    stage: RejectionSamplingStage,
    run: StageRun,
    drafts: Sequence[Draft],
) -> list[str | None]:
    """Process 0 sends requests, in a thread; meanwhile all processes look whether to stop."""
    stop = threading.Event()
    pushed = time.monotonic()
    with ThreadPoolExecutor(1) as thread:
        replies: Future[list[str | None]] | None = None
        try:
            if jax.process_index() == 0:
                rewriter = EndpointRewriter(
                    settings=section,
                    log=RewriteLog(run.directory / REWRITTEN),
                    stop_requested=lambda: run.stop.requested or stop.is_set(),
                )
                replies = thread.submit(rewriter.rewrite, drafts)
            while any_process(
                replies is not None and bool(wait([replies], _LOOK_EVERY).not_done),
                run.layouts.rollout,
            ):
                if run.stop.in_any_process():
                    stop.set()
                HEARTBEAT.beat()  # the requests have deadlines of their own
                if time.monotonic() - pushed > _PUSH_EVERY:
                    run.files.push()
                    pushed = time.monotonic()
        except BaseException:
            stop.set()
            raise
    texts: list[str | None] = []
    failure = stopped = None
    if replies is not None:
        try:
            texts = replies.result()
        except EndpointError as error:  # the other processes must learn of it
            failure = str(error)
        except Stopped as error:
            stopped = str(error)
    failure, stopped, *texts = from_process_zero([failure, stopped, *texts], run.layouts.rollout)
    if failure is not None:
        raise RunError(f"{stage.name}: {failure}")
    if stopped is not None:
        raise Preempted(f"{stage.name}: {stopped}")
    return texts


def _rewrite_with_model(
    section: ModelRewrite, stage: RejectionSamplingStage, run: StageRun, drafts: Sequence[Draft]
) -> list[str | None]:
    """One completion of a model of the run for each draft; resumes behind the last whole queue.

    Process 0 keeps the replies of a batch before the next one is sampled.
    """
    sampler = run.models.sampler_of(section.weights)
    share = process_batch_slice(run.layouts.rollout)
    data = DataSection(source="jsonl:-", template=section.template)
    instruction = section.instruction or INSTRUCTION
    prompts = [
        encode_prompt(
            Example(id=i, prompt=instruction_prompt(each, instruction), answer=""),
            data,
            sampler.tokenizer,
        )
        for i, each in enumerate(drafts)
    ]
    # A draft's index is part of its noise, so equal drafts may get unlike replies.
    settings = section.model_dump(mode="json", exclude={"style"})
    keys = [RewriteLog.key(each, {**settings, "place": i}) for i, each in enumerate(drafts)]
    log = RewriteLog(run.directory / REWRITTEN) if jax.process_index() == 0 else None
    known = [None if log is None or key not in log else astuple(log[key]) for key in keys]
    replies = [
        None if each is None else Reply(*each)
        for each in from_process_zero(known, run.layouts.rollout)
    ]
    options = generate_options(
        sampler,
        section.sampling,
        samples=1,
        max_new_tokens=section.max_new_tokens,
        seed=seed_of(run.config.seed, stage.name, "rewrite"),
    )
    size = section.drafts_per_batch
    batches = [
        range(start, min(start + size, len(prompts))) for start in range(0, len(prompts), size)
    ]
    weights = None
    for first in range(0, len(batches), QUEUE_BATCHES):
        queue = batches[first : first + QUEUE_BATCHES]
        if None not in replies[queue[0].start : queue[-1].stop]:
            continue
        of_process = [slice_of_process([prompts[i] for i in batch], size, share) for batch in queue]
        if weights is None:
            weights = run.models.weights(section.weights, sampler)
        every = [prompt for each in of_process for prompt in each]
        rounds = sample_prompts(weights, every, sampler, options, batch=size // share.count)
        written = whole_batches(rounds, [len(each) for each in of_process], run.layouts.rollout)
        for batch in queue:
            if run.stop.in_any_process():
                done = sum(each is not None for each in replies)
                raise Preempted(f"{stage.name}: {done} of {len(prompts)} drafts are rewritten")
            texts = [(c.prompt.prefill + c.text, c.finish == Finish.LENGTH) for c in next(written)]
            of_batch = [Reply(*each) for each in gather(texts, run.layouts.rollout)]
            if log is not None:
                for i, reply in zip(batch, of_batch, strict=True):
                    if replies[i] is None:
                        log.add(keys[i], reply)
                run.files.push()
            replies[batch.start : batch.stop] = of_batch
    return _accepted(section, drafts, replies)


def _accepted(
    section: ModelRewrite, drafts: Sequence[Draft], replies: Sequence[Reply | None]
) -> list[str | None]:
    return [
        None if reply is None else reply.accepted(each, section.style)
        for each, reply in zip(drafts, replies, strict=True)
    ]
