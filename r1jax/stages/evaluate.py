"""Evaluation as in the paper: k samples per problem, every sample stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1jax.config.schema import EvaluateStage, RewardSection
from r1jax.data import encode_prompts, load_examples
from r1jax.evaluation.metrics import summarise
from r1jax.metrics import Progress, Recorder, read_rows
from r1jax.rewards import Verifier
from r1jax.rewards.maths import equivalent_key
from r1jax.stages.context import Clock, Context, Preempted
from r1jax.stages.rollout import sample_batch, stop_search, to_sampling


def run_evaluate(stage: EvaluateStage, context: Context, directory: Path, params: Any) -> Any:
    """Sample, score and store; resumes behind the last whole batch. Returns `params` as given."""
    section = context.config.data[stage.data]
    examples = load_examples(section)
    if stage.problems is not None:
        if stage.problems > len(examples):
            raise ValueError(
                f"stages.{stage.name}.problems = {stage.problems}: data.{stage.data} has "
                f"{len(examples)}"
            )
        examples = examples[: stage.problems]
    prompts, report = encode_prompts(examples, section, context.tokenizer)
    clock = Clock(context.seconds(stage.name))
    rewards = context.config.rewards or {"accuracy": RewardSection()}
    directory.mkdir(parents=True, exist_ok=True)
    with (
        Recorder(directory) as recorder,
        Progress(stage.name, len(prompts)) as progress,
        Verifier(rewards, context.config.verifier) as verifier,
    ):
        progress.print(f"{stage.name}: {report}")
        done, offset = _whole_batches(directory / "samples.jsonl", stage, len(prompts))
        recorder.rewind({"samples.jsonl": offset})
        clock.lap("setup")
        while done < len(prompts):
            batch = prompts[done : done + stage.problems_per_batch]
            completions = sample_batch(
                params,
                batch,
                context.model,
                context.tokenizer,
                rows=stage.problems_per_batch,
                samples=stage.samples_per_problem,
                max_new_tokens=stage.max_new_tokens,
                # The same noise before and after training: differences are the model's.
                seed=context.seed("evaluate", stage.data),
                sampling=to_sampling(stage.sampling),
                eos_ids=context.eos_ids,
                stop=stop_search(context.tokenizer, stage.sampling),
            )
            scores = verifier.submit([c.answered() for c in completions]).result()
            recorder.log_samples(
                completion.row(score, step=0)
                for completion, score in zip(completions, scores, strict=True)
            )
            done += len(batch)
            tokens = sum(len(c.token_ids) for c in completions)
            progress.update(
                done,
                accuracy=sum(s.outcome == "right" for s in scores) / len(scores),
                length=tokens / len(completions),
                tokens_per_second=tokens / clock.lap("evaluate"),
            )
            context.mark(stage.name, stage.kind, "running", clock.seconds)
            if context.stop_requested and done < len(prompts):
                raise Preempted(f"{stage.name}: {done} of {len(prompts)} problems are stored")
    summary = summarise(read_rows(directory / "samples.jsonl"), same_answer=equivalent_key)
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    context.mark(stage.name, stage.kind, "done", clock.seconds)
    return params


def _whole_batches(path: Path, stage: EvaluateStage, problems: int) -> tuple[int, int]:
    """Problems whose batch is stored completely, and the offset behind them in bytes."""
    if not path.exists():
        return 0, 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = sum(line.endswith(b"\n") for line in lines) // stage.samples_per_problem
    done = problems if whole >= problems else whole - whole % stage.problems_per_batch
    return done, sum(map(len, lines[: done * stage.samples_per_problem]))
