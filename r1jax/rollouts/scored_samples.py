"""Sampling a dataset and scoring every sample, as rows of samples.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import jax

from r1jax.data.prompts import Prompt
from r1jax.files import JsonObject, read_rows
from r1jax.metrics.heartbeat import HEARTBEAT
from r1jax.metrics.progress import Progress
from r1jax.metrics.recorder import Recorder
from r1jax.models.parameters import Params
from r1jax.processes import BatchSlice, gather, process_batch_slice
from r1jax.rewards import RowScore
from r1jax.rollouts.sampling import (
    QUEUE_BATCHES,
    Completion,
    generate_options,
    whole_batches,
)
from r1jax.rollouts.scoring import (
    PendingRewards,
    RewardScorer,
    check_domains,
    check_first_rewards,
    reward_scorer,
)
from r1jax.rollouts.turns import Attempts, instructions_of, sample_attempts, with_earlier
from r1jax.run.models import LanguageModel
from r1jax.run.record import Clock
from r1jax.run.resolve import StageRun
from r1jax.run.stop import Preempted
from r1jax.sampler import GenerateOptions
from r1jax.settings.sampling import DatasetSampling
from r1jax.settings.stage import Stage
from r1jax.settings.turns import attempt_limits
from r1jax.sharding import Layout

SAMPLES = "samples.jsonl"
T = TypeVar("T")


# A prompt, and the index of the first of its samples that are drawn at once.
PromptPart = tuple[Prompt, int]


@dataclass(frozen=True)
class ScoredParts:
    """Prompts whose samples are drawn and scored, and where the rows go.

    parts: in the order of the rows. options: of the sampler, with the samples of a part.
    per_prompt: consecutive parts of one prompt. batch: parts at once, over all processes.
    attempts: at each question; None: one.
    directory: of `samples.jsonl`. share_name: on the progress bar, of the share of right samples.
    left_out: columns that are not stored.
    """

    parts: Sequence[PromptPart]
    options: GenerateOptions
    batch: int
    directory: Path
    share_name: str
    per_prompt: int = 1
    left_out: tuple[str, ...] = ()
    attempts: Attempts | None = None


@dataclass
class SampleMeans:
    """The share of right samples, and their mean of tokens, of all so far: for the progress bar."""

    samples: int = 0
    right: int = 0
    tokens: int = 0

    def add(self, rows: Iterable[JsonObject], tokens: Callable[[JsonObject], int]) -> int:
        """Counts these samples, each with its `tokens`, too; gives the tokens of them all."""
        before = self.tokens
        for row in rows:
            self.samples += 1
            self.right += row["outcome"] == "right"
            self.tokens += tokens(row)
        return self.tokens - before

    @property
    def share_right(self) -> float:
        return self.right / max(self.samples, 1)

    @property
    def mean_tokens(self) -> float:
        return self.tokens / max(self.samples, 1)


def store_scored_samples(
    stage: Stage, run: StageRun, wanted: DatasetSampling, seed: int, share_name: str
) -> tuple[Clock, list[Prompt]]:
    """Sample every prompt, score every sample and store all of them in `samples.jsonl`.

    Resumes behind the last queue of batches that is stored whole. The progress bar shows the share
    of right samples, of all so far, as `share_name`.

    Returns:
      The stage's clock, and the prompts.
    """
    sampler = run.models.sampler_of(stage.name)
    prompts, report = run.datasets.prompts(wanted.data, sampler.tokenizer, wanted.limit)
    check_domains(stage, {prompt.domain: wanted.data for prompt in prompts}, run.config)
    count = wanted.samples_at_once
    options = generate_options(
        sampler, wanted.sampling, samples=count, max_new_tokens=wanted.max_new_tokens, seed=seed
    )
    attempts = None
    if wanted.turns:
        instructions = instructions_of(wanted.turns, [wanted.data], run, sampler)
        attempts = Attempts(attempt_limits(wanted.turns, wanted.max_new_tokens), instructions)
    parts = ScoredParts(
        [(prompt, at) for prompt in prompts for at in range(0, wanted.samples, count)],
        options,
        wanted.batch,
        run.directory,
        share_name,
        per_prompt=wanted.samples // count,
        attempts=attempts,
    )
    return store_scored_parts(stage, run, parts, report), prompts


def store_scored_parts(stage: Stage, run: StageRun, wanted: ScoredParts, report: str) -> Clock:
    """Sample and score all parts; see `store_scored_samples`. `report` is printed first."""
    sampler = run.models.sampler_of(stage.name)
    rewards = run.config.rewards_of(stage)
    clock = Clock(run.record.seconds(stage.name))
    process = jax.process_index()
    parts, options, batch = wanted.parts, wanted.options, wanted.batch
    count, total = options.samples, len(parts) // wanted.per_prompt
    with (
        Recorder(wanted.directory, process_index=process) as recorder,
        Progress(run.label_of(stage), total, process_index=process) as progress,
        reward_scorer(rewards, run) as scorer,
    ):
        progress.print(f"{stage.name}: {report}")
        queue = batch * QUEUE_BATCHES
        path, means = wanted.directory / SAMPLES, SampleMeans()
        done, offset = _whole_queues(path, len(parts), count, queue)
        if done:
            means.add(islice(read_rows(path), done * count), _tokens)
        source = run.config.weights_of(stage.name)
        params = run.models.weights(source, sampler) if done < len(parts) else None
        recorder.rewind({SAMPLES: offset})
        clock.lap("setup")
        for rows in chain.from_iterable(
            scored_batches(
                params,
                parts[start : start + queue],
                sampler,
                scorer,
                options,
                batch,
                wanted.attempts,
            )
            for start in range(done, len(parts), queue)
        ):
            recorder.log_samples(
                {key: value for key, value in row.items() if key not in wanted.left_out}
                for row in rows
            )
            done += len(rows) // count
            tokens = means.add(rows, _tokens)
            whole_prompts = done // wanted.per_prompt
            HEARTBEAT.set_step(whole_prompts)
            progress.update(
                whole_prompts,
                {
                    wanted.share_name: means.share_right,
                    "length": means.mean_tokens,
                    "tokens_per_second": tokens / clock.lap(stage.kind),
                },
            )
            run.record.mark(stage, "running", clock.seconds)
            if run.stop.in_any_process() and done < len(parts):
                kept = (done - done % queue) // wanted.per_prompt
                raise Preempted(f"{stage.name}: {kept} of {total} prompts are stored")
    # Process 0 has written the last rows when any process goes on to read them.
    run.files.wait_for_files(stage.name)
    return clock


def scored_batches(
    params: Params | None,
    parts: Sequence[PromptPart],
    sampler: LanguageModel,
    scorer: RewardScorer,
    options: GenerateOptions,
    batch: int,
    attempts: Attempts | None = None,
) -> Iterator[list[JsonObject]]:
    """Sample parts of prompts and score every sample; gives the rows batch by batch.

    All parts are one queue, of several attempts one for each. Each process samples and scores its
    share of a batch; every process gets all rows, in order. Of `batch` parts at once, over all
    processes. `params` is None where there are no parts.
    """
    if not parts:
        return
    assert params is not None
    layout, attempts = sampler.decoder.layout, attempts or Attempts((options.max_new_tokens,))
    group = options.samples * attempts.count
    share = process_batch_slice(layout)
    batches = [
        slice_of_process(parts[start : start + batch], batch, share)
        for start in range(0, len(parts), batch)
    ]
    of_process = [part for each in batches for part in each]
    rules: dict[int, RowScore] = {}
    pending: list[tuple[list[int], PendingRewards]] = []

    def submitted() -> Iterator[list[tuple[int, Completion]]]:
        for ended in sample_attempts(
            params, of_process, sampler, options, attempts, batch=batch // share.count
        ):
            pending.append(([i for i, _ in ended], scorer.submit([each for _, each in ended])))
            yield ended

    first = 0  # completion of the batch
    for of_batch in whole_batches(submitted(), [len(each) * group for each in batches], layout):
        for indices, each in pending:
            rules |= dict(zip(indices, each.rule_rows() or (), strict=False))
        pending.clear()
        span = range(first, first + len(of_batch))
        scores = scorer.with_models(of_batch, [rules.pop(i) for i in span] if rules else None)
        of_batch, scores = with_earlier(of_batch, scores, attempts.count)
        yield _rows(of_batch, scores, scorer, layout, check=span.start == 0)
        first = span.stop


def _tokens(row: JsonObject) -> int:
    """Of all attempts of a sample."""
    return sum(turn["length"] for turn in row.get("turns", [row]) if "length" in turn)


def _rows(
    completions: Sequence[Completion],
    scores: Sequence[RowScore],
    scorer: RewardScorer,
    layout: Layout,
    *,
    check: bool,
) -> list[JsonObject]:
    """The rows of a batch, of all processes."""
    pairs = zip(completions, scores, strict=True)
    rows = gather([completion.row(score, step=0) for completion, score in pairs], layout)
    if check:
        check_first_rewards(rows, scorer.rewards)
    return rows


def slice_of_process(batch: Sequence[T], whole: int, share: BatchSlice) -> Sequence[T]:
    """This process's part of a batch that may be smaller than `whole`, the last one."""
    count = whole // share.count
    return batch[share.index * count : (share.index + 1) * count]


def _whole_queues(path: Path, parts: int, samples: int, queue: int) -> tuple[int, int]:
    """Parts whose queue is stored completely, and the offset behind them in bytes."""
    if not path.exists():
        return 0, 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines) // samples
    done = parts if whole >= parts else whole - whole % queue
    return done, sum(map(len, lines[: done * samples]))
