"""Evaluation as in the paper: k samples per problem, every sample stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from r1jax.config.schema import EvaluateStage
from r1jax.data import Prompt
from r1jax.evaluation.metrics import summarise
from r1jax.metrics import Progress, Recorder, read_rows
from r1jax.processes import Share, anywhere, batch_share, gather
from r1jax.rewards import Verifier
from r1jax.rewards.maths import equivalent_key
from r1jax.stages.context import Clock, Context, Preempted
from r1jax.stages.rollout import check_domains, sample_batch, stop_search, to_sampling


def run_evaluate(stage: EvaluateStage, context: Context, directory: Path) -> None:
    """Sample, score and store; resumes behind the last whole batch."""
    model = context.model_of(stage.name)
    prompts, report = context.prompts(stage.data, model.tokenizer, stage.problems)
    clock = Clock(context.seconds(stage.name))
    rewards = context.config.rewards_of(stage.rewards)
    check_domains(stage.name, {prompt.domain: stage.data for prompt in prompts}, rewards)
    directory.mkdir(parents=True, exist_ok=True)
    with (
        Recorder(directory, process_index=jax.process_index()) as recorder,
        Progress(stage.name, len(prompts), process_index=jax.process_index()) as progress,
        Verifier(rewards, context.config.verifier) as verifier,
    ):
        progress.print(f"{stage.name}: {report}")
        share = batch_share(context.layout)
        done, offset = _whole_batches(directory / "samples.jsonl", stage, len(prompts))
        params = context.initial_weights(stage.name) if done < len(prompts) else None
        recorder.rewind({"samples.jsonl": offset})
        clock.lap("setup")
        while done < len(prompts):
            batch = prompts[done : done + stage.problems_per_batch]
            own = _slice_of_process(batch, stage.problems_per_batch, share)
            completions = sample_batch(
                params,
                own or batch[-1:],  # a process without a problem of its own still takes part
                model.decoder,
                model.tokenizer,
                rows=stage.problems_per_batch // share.count,
                samples=stage.samples_per_problem,
                max_new_tokens=stage.max_new_tokens,
                # The same noise before and after training: differences are the model's.
                seed=context.seed("evaluate", stage.data),
                sampling=to_sampling(stage.sampling),
                eos_ids=model.eos_ids,
                stop=stop_search(model.tokenizer, stage.sampling),
            )
            completions = completions[: len(own) * stage.samples_per_problem]
            scores = verifier.submit([c.answered() for c in completions]).result()
            pairs = zip(completions, scores, strict=True)
            rows = gather([c.row(score, step=0) for c, score in pairs], context.layout)
            recorder.log_samples(rows)
            done += len(batch)
            tokens = sum(row["length"] for row in rows)
            progress.update(
                done,
                accuracy=sum(row["outcome"] == "right" for row in rows) / len(rows),
                length=tokens / len(rows),
                tokens_per_second=tokens / clock.lap("evaluate"),
            )
            context.mark(stage.name, stage.kind, "running", clock.seconds)
            if anywhere(context.stop_requested) and done < len(prompts):
                raise Preempted(f"{stage.name}: {done} of {len(prompts)} problems are stored")
    if jax.process_index() == 0:
        summary = summarise(read_rows(directory / "samples.jsonl"), same_answer=equivalent_key)
        (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    context.mark(stage.name, stage.kind, "done", clock.seconds)


def _slice_of_process(batch: Sequence[Prompt], whole: int, share: Share) -> Sequence[Prompt]:
    """This process's problems of a batch that may be smaller than `whole`, the last one."""
    own = whole // share.count
    return batch[share.index * own : (share.index + 1) * own]


def _whole_batches(path: Path, stage: EvaluateStage, problems: int) -> tuple[int, int]:
    """Problems whose batch is stored completely, and the offset behind them in bytes."""
    if not path.exists():
        return 0, 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines) // stage.samples_per_problem
    done = problems if whole >= problems else whole - whole % stage.problems_per_batch
    return done, sum(map(len, lines[: done * stage.samples_per_problem]))
