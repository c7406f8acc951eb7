"""A run: the stages of a config, one after the other, each resumable."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from r1jax.config.schema import EvaluateStage, GRPOStage, PretrainStage, RunConfig
from r1jax.data.templates import check_template
from r1jax.evaluation.results import write_results
from r1jax.models import abstract_params, declare, init_params
from r1jax.models.parameters import is_spec
from r1jax.processes import wait_for_all
from r1jax.report import write_report
from r1jax.rewards.registry import check_reward
from r1jax.stages.context import Context, Preempted
from r1jax.stages.evaluate import run_evaluate
from r1jax.stages.grpo import run_grpo
from r1jax.stages.pretrain import run_pretrain
from r1jax.weights import hugging_face

EXIT_PREEMPTED = 143
"""Exit status after SIGTERM (128 + 15): the state is saved, the same command goes on."""


def run(config: RunConfig) -> int:
    """Run or resume all stages and write results.json and report.html.

    Returns:
      0, or `EXIT_PREEMPTED`.

    Raises:
      ValueError, RunError: with a message for the user; everything finished stays on disk.
    """
    context = Context.resolve(config)
    check(context)
    context.open_record()
    console = Console(highlight=False)
    try:
        with context.stopping_on_sigterm():
            for index, stage in enumerate(config.stages):
                directory = context.stage_directory(index)
                if context.status(stage.name) == "done":
                    continue
                initial = partial(starting_weights, context, index)
                directory.mkdir(parents=True, exist_ok=True)
                context.mark(stage.name, stage.kind, "running", context.seconds(stage.name))
                if isinstance(stage, PretrainStage):
                    run_pretrain(stage, context, directory, initial)
                elif isinstance(stage, GRPOStage):
                    run_grpo(stage, context, directory, initial)
                else:
                    run_evaluate(stage, context, directory, initial)
    except Preempted as stop:
        if jax.process_index() == 0:
            console.print(f"Stopped by SIGTERM. {stop}; the same command goes on.")
        return EXIT_PREEMPTED
    wait_for_all("stages")
    if jax.process_index() == 0:
        write_results(context.directory)
        console.print(f"Report: {write_report(context.directory)}", soft_wrap=True)
    return 0


def check(context: Context) -> None:
    """Refuse, before any compute, what would fail later: data, templates, rewards, sharding."""
    config = context.config
    for name, reward in config.rewards.items():
        check_reward(name, reward.options)
    for name, section in config.data.items():
        check_template(section)
        used = [stage for stage in config.stages if stage.data == name]
        if used and len(context.examples(name)) == 0:
            raise ValueError(f"data.{name}: no examples")
    model = context.model
    abstract_params(model.config, model.layout, model.execution.param_dtype)
    rows = {
        f"stages.{s.name}.rows_per_step / micro_batches": s.rows_per_step // s.micro_batches
        for s in config.stages
        if isinstance(s, PretrainStage)
    } | {
        f"stages.{s.name}: questions_per_step x outputs_per_question / micro_batches": (
            s.questions_per_step * s.outputs_per_question // s.micro_batches
        )
        for s in config.stages
        if isinstance(s, GRPOStage)
    }
    rows |= {
        f"stages.{s.name}.problems_per_batch": s.problems_per_batch
        for s in config.stages
        if isinstance(s, EvaluateStage) and jax.process_count() > 1
    }
    shards = model.layout.shards("batch")
    for name, count in rows.items():
        if count % shards:
            raise ValueError(
                f"{name} = {count} is not a multiple of {shards}, the mesh's split of the batch"
            )


def starting_weights(context: Context, index: int) -> Any:
    """The weights that the stage before left, or the model's own."""
    model, dtype = context.model, context.model.execution.param_dtype
    for before in reversed(range(index)):
        directory = context.stage_directory(before) / "model"
        if directory.exists():
            return hugging_face.load_params(directory, model.config, model.layout, dtype)
    section = context.config.model
    if section.path is not None:
        path = hugging_face.resolve(section.path)
        return hugging_face.load_params(path, model.config, model.layout, dtype)
    key = jax.random.key(context.seed("weights"))
    return init_params(key, model.config, model.layout, dtype)


def export_run(run_dir: Path, destination: Path, stage: str | None = None) -> Path:
    """Copy the Hugging Face directory of a stage (default: the last that has one)."""
    found = sorted(Path(run_dir).glob("stages/*/model"))
    if stage is not None:
        found = [path for path in found if path.parent.name.split("-", 1)[1] == stage]
    if not found:
        raise ValueError(
            f"{run_dir} has no finished train stage{f' {stage!r}' if stage else ''} to export"
        )
    if destination.exists():
        raise ValueError(f"{destination} exists; name a new directory")
    shutil.copytree(found[-1], destination)
    return destination


def evaluation_config(config: RunConfig, model_path: str, stage_name: str | None) -> RunConfig:
    """The config that evaluates the weights at `model_path` as one evaluate stage says."""
    stages = [stage for stage in config.stages if isinstance(stage, EvaluateStage)]
    if stage_name is not None:
        stages = [stage for stage in stages if stage.name == stage_name]
    if not stages:
        raise ValueError(
            f"the config has no evaluate stage{f' named {stage_name!r}' if stage_name else ''}"
        )
    model = config.model.model_copy(
        update={"path": model_path, "config": None, "tokenizer": model_path}
    )
    return config.model_copy(
        update={"model": model, "stages": stages[-1:], "name": f"{config.name}-eval"}
    )


def describe(config: RunConfig) -> dict[str, Any]:
    """What `--dry-run` shows: parameters, the sharding of each weight, a memory estimate.

    Memory is in bytes for one device, and an estimate: activations are those that remat keeps.
    """
    context = Context.resolve(config)
    check(context)
    model = context.model
    layout, execution = model.layout, model.execution
    abstract = abstract_params(model.config, layout, execution.param_dtype)
    specs = jax.tree.leaves(declare(model.config), is_leaf=is_spec)
    weights: list[dict[str, Any]] = []
    for (path, leaf), spec in zip(jax.tree.leaves_with_path(abstract), specs, strict=True):
        local = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        weights.append(
            {
                "name": jax.tree_util.keystr(path, simple=True, separator="."),
                "shape": leaf.shape,
                "dtype": leaf.dtype.name,
                "axes": spec.axes,
                "sharding": str(leaf.sharding.spec),
                "bytes": local,
            }
        )
    own = sum(weight["bytes"] for weight in weights)
    memory = [{"what": "weights", "bytes": own}, *_training_memory(config.stages, context, own)]
    return {
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)),
        "weights": weights,
        "memory": memory,
        "devices": f"{layout.mesh.size} x {jax.devices()[0].device_kind}, mesh "
        + ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items()),
    }


def _training_memory(stages: Sequence[Any], context: Context, own: int) -> list[dict[str, Any]]:
    model = context.model
    config, execution = model.config, model.execution
    shards = model.layout.shards("batch")
    compute = jnp.dtype(execution.compute_dtype).itemsize
    rows: list[dict[str, Any]] = []
    for stage in stages:
        if isinstance(stage, EvaluateStage):
            continue
        moments = 1 + jnp.dtype(stage.optimizer.moment_dtype).itemsize / 4
        rows.append({"what": f"{stage.name}: gradients", "bytes": own})
        rows.append({"what": f"{stage.name}: optimizer moments", "bytes": int(own * moments)})
        if isinstance(stage, PretrainStage):
            count, time = stage.rows_per_step // stage.micro_batches, stage.row_tokens
        else:
            limit = stage.max_new_tokens
            new = limit if isinstance(limit, int) else max(change.tokens for change in limit)
            prompt = context.config.data[stage.data].max_prompt_tokens
            samples = stage.questions_per_step * stage.outputs_per_question
            count, time = samples // stage.micro_batches, prompt + new
            questions = stage.questions_per_step * stage.mini_batches_per_rollout
            questions //= stage.rollout_batches
            per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            cached = questions * (prompt + stage.outputs_per_question * new)
            if stage.loss.kl_coefficient:
                rows.append({"what": f"{stage.name}: reference policy", "bytes": own})
            rows.append(
                {
                    "what": f"{stage.name}: key-value cache",
                    "bytes": cached * per_token * compute // shards,
                }
            )
        kept = {"full": 1, "dots": 8, "none": 20}[execution.remat] * config.hidden_size
        activations = count * time * config.num_hidden_layers * kept * compute
        chunk = count * min(execution.log_prob_chunk, time) * config.vocab_size * 4 * 2
        rows.append({"what": f"{stage.name}: activations", "bytes": activations // shards})
        rows.append({"what": f"{stage.name}: a chunk of logits", "bytes": chunk // shards})
    return rows
