"""Sampling a dataset and judging every sample: what evaluation and rejection sampling share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from r1jax.data import Prompt
from r1jax.metrics import HEARTBEAT, Progress, Recorder
from r1jax.processes import BatchSlice, any_process, gather, process_batch_slice
from r1jax.rollouts.sampling import check_domains, sample_batch, stop_search, to_sampling
from r1jax.rollouts.scoring import Judge
from r1jax.run.context import Clock, Context, LanguageModel, Preempted
from r1jax.sampler import GenerateOptions
from r1jax.settings.sampling import SamplingSection
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage

SAMPLES = "samples.jsonl"
Rows = list[dict[str, Any]]
# A prompt, and the first of its samples that are drawn at once.
Part = tuple[Prompt, int]
T = TypeVar("T")


def judge_samples(
    stage: EvaluateStage | RejectionSamplingStage,
    context: Context,
    directory: Path,
    *,
    limit: int | None,
    samples: int,
    batch: int,
    samples_per_batch: int | None = None,
    seed: int,
    progress_figures: Callable[[Rows], dict[str, float]],
) -> tuple[Clock, list[Prompt]]:
    """Sample every prompt, score every sample and store all of them in `samples.jsonl`.

    Resumes behind the last batch that is stored whole. With several processes each samples and
    scores its share, and process 0 stores all.

    Args:
      limit: prompts that are sampled; None: all.
      samples: completions per prompt.
      batch: prompts at once, over all processes; with `samples_per_batch`, parts of prompts.
      samples_per_batch: completions of a prompt at once; default: all.
      seed: of the noise.
      progress_figures: rows of a batch -> what the bar shows beside length and tokens/s.

    Returns:
      The stage's clock, and the prompts.
    """
    model = context.sampler_of(stage.name)
    prompts, report = context.prompts(stage.data, model.tokenizer, limit)
    rewards = context.config.rewards_of(stage)
    check_domains(stage.name, {prompt.domain: stage.data for prompt in prompts}, rewards)
    clock = Clock(context.seconds(stage.name))
    process = jax.process_index()
    directory.mkdir(parents=True, exist_ok=True)
    with (
        Recorder(directory, process_index=process) as recorder,
        Progress(stage.name, len(prompts), process_index=process) as progress,
        Judge(rewards, context) as judge,
    ):
        progress.print(f"{stage.name}: {report}")
        count = samples_per_batch or samples
        parts = split_samples(prompts, samples, count)
        done, offset = _whole_batches(directory / SAMPLES, len(parts), count, batch)
        source = context.config.weights_of(stage.name)
        params = context.weights(source, model) if done < len(parts) else None
        recorder.rewind({SAMPLES: offset})
        clock.lap("setup")
        for rows in judged_batches(
            params,
            parts[done:],
            model,
            judge,
            batch=batch,
            samples=count,
            max_new_tokens=stage.max_new_tokens,
            seed=seed,
            sampling=stage.sampling,
        ):
            recorder.log_samples(rows)
            done += len(rows) // count
            tokens = sum(row["length"] for row in rows)
            asked_in_full = done * count // samples
            HEARTBEAT.set_step(asked_in_full)
            progress.update(
                asked_in_full,
                {
                    **progress_figures(rows),
                    "length": tokens / len(rows),
                    "tokens_per_second": tokens / clock.lap(stage.kind),
                },
            )
            context.mark(stage.name, stage.kind, "running", clock.seconds)
            if any_process(context.stop_requested) and done < len(parts):
                stored = f"{asked_in_full} of {len(prompts)} prompts are stored"
                raise Preempted(f"{stage.name}: {stored}")
    # Process 0 has written the last rows when any process goes on to read them.
    context.wait_for_files(stage.name)
    return clock, prompts


def split_samples(prompts: Iterable[Prompt], samples: int, count: int) -> list[Part]:
    """Every prompt's samples, `count` at once; `count` divides `samples`."""
    return [(prompt, first) for prompt in prompts for first in range(0, samples, count)]


def judged_batches(
    params: Any,
    parts: Sequence[Part],
    model: LanguageModel,
    judge: Judge,
    *,
    batch: int,
    samples: int,
    max_new_tokens: int,
    seed: int,
    sampling: SamplingSection,
) -> Iterator[Rows]:
    """Sample parts of prompts and score every sample, batch by batch.

    Each process samples and scores its share of a batch; every process gets all rows, in order.

    Args:
      batch: parts at once, over all processes.
      samples: completions of a part.
      seed: of the noise.
    """
    layout = model.decoder.layout
    share = process_batch_slice(layout)
    for start in range(0, len(parts), batch):
        asked = parts[start : start + batch]
        own = slice_of_process(asked, batch, share)
        drawn = own or asked[-1:]  # a process without a prompt of its own still takes part
        completions = sample_batch(
            params,
            [prompt for prompt, _ in drawn],
            model.decoder,
            model.tokenizer,
            GenerateOptions(
                samples=samples,
                max_new_tokens=max_new_tokens,
                seed=seed,
                sampling=to_sampling(sampling),
                eos_ids=model.eos_ids,
                stop=stop_search(model.tokenizer, sampling),
                speculative=sampling.speculative,
            ),
            rows=batch // share.count,
            firsts=[first for _, first in drawn],
        )
        completions = completions[: len(own) * samples]
        scores = judge.submit(completions).result()
        pairs = zip(completions, scores, strict=True)
        yield gather([c.row(score, step=0) for c, score in pairs], layout)


def share_right(rows: Iterable[dict[str, Any]]) -> float:
    """The share of samples whose main reward says right."""
    outcomes = [row["outcome"] for row in rows]
    return sum(outcome == "right" for outcome in outcomes) / len(outcomes)


def slice_of_process(batch: Sequence[T], whole: int, share: BatchSlice) -> Sequence[T]:
    """This process's part of a batch that may be smaller than `whole`, the last one."""
    own = whole // share.count
    return batch[share.index * own : (share.index + 1) * own]


def _whole_batches(path: Path, parts: int, samples: int, batch: int) -> tuple[int, int]:
    """Parts whose batch is stored completely, and the offset behind them in bytes."""
    if not path.exists():
        return 0, 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines) // samples
    done = parts if whole >= parts else whole - whole % batch
    return done, sum(map(len, lines[: done * samples]))
