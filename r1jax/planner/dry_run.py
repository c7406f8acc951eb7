"""What a run would take: parameters, shardings and memory, without running anything."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.config.run_config import RunConfig
from r1jax.models import declare
from r1jax.models.parameters import is_spec
from r1jax.recipe import check
from r1jax.run.context import Context, LanguageModel
from r1jax.settings.stage import Stage
from r1jax.sharding import Layout
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.rejection_sampling.settings import RejectionSamplingStage
from r1jax.stages.reward_model.settings import RewardModelStage


def describe(config: RunConfig) -> dict[str, Any]:
    """What `--dry-run` shows: parameters, the sharding of each weight, a memory estimate.

    Memory is in bytes for one device, and an estimate: activations are those that remat keeps.
    """
    context = Context.resolve(config)
    check(context)
    layout, sampling = context.layout, context.rollout_layout
    weights: list[dict[str, Any]] = []
    memory: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    for name, model in context.models.items():
        own = _weights(model)
        prefix = f"{name}." if len(context.models) > 1 else ""
        weights += [{**weight, "name": prefix + weight["name"]} for weight in own]
        sizes[name] = sum(weight["bytes"] for weight in own)
        memory.append({"what": f"{prefix}weights", "bytes": sizes[name]})
    for stage in config.stages:
        memory += _stage_memory(stage, context, sizes[config.model_of(stage.name)])
    return {
        "parameters": sum(math.prod(weight["shape"]) for weight in weights),
        "weights": weights,
        "memory": memory,
        "devices": f"{layout.mesh.size} x {jax.devices()[0].device_kind}, mesh "
        + _shape(layout)
        + ("" if layout.mesh == sampling.mesh else f"; while sampling {_shape(sampling)}"),
    }


def _shape(layout: Layout) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())


def _weights(model: LanguageModel) -> list[dict[str, Any]]:
    named = jax.tree.leaves_with_path(model.abstract_params())
    specs = jax.tree.leaves(declare(model.decoder.config), is_leaf=is_spec)
    return [
        {
            "name": jax.tree_util.keystr(path, simple=True, separator="."),
            "shape": leaf.shape,
            "dtype": leaf.dtype.name,
            "axes": spec.axes,
            "sharding": str(leaf.sharding.spec),
            "bytes": math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        }
        for (path, leaf), spec in zip(named, specs, strict=True)
    ]


def _stage_memory(stage: Stage, context: Context, own: int) -> list[dict[str, Any]]:
    """What a stage holds beside the weights, whose bytes on a device are `own`."""
    decoder = context.model_of(stage.name).decoder
    config, execution = decoder.config, decoder.execution
    shards = context.layout.shards("batch")
    sampling_shards = context.rollout_layout.shards("batch")
    compute = jnp.dtype(execution.compute_dtype).itemsize
    per_token = config.cache_values * compute
    if isinstance(stage, EvaluateStage | RejectionSamplingStage):
        if isinstance(stage, EvaluateStage):
            samples = stage.samples_per_batch or stage.samples_per_problem
            asked = stage.problems_per_batch
        else:
            samples, asked = stage.samples_per_prompt, stage.prompts_per_batch
        asked = -(-asked // sampling_shards)  # each device has one at least
        cached = asked * (longest_prompt(stage, context.config) + samples * stage.max_new_tokens)
        size = cached * per_token
        return [{"what": f"{stage.name}: key-value cache, all at full length", "bytes": size}]
    moments = 1 + jnp.dtype(stage.optimizer.moment_dtype).itemsize / 4
    sizes = {"gradients": own, "optimizer moments": int(own * moments)}
    if isinstance(stage, GRPOStage):
        limit = stage.max_new_tokens
        new = limit if isinstance(limit, int) else max(change.tokens for change in limit)
        prompt = longest_prompt(stage, context.config)
        samples = stage.questions_per_step * stage.outputs_per_question
        count, time = samples // stage.micro_batches, prompt + new
        questions = stage.questions_per_step * stage.mini_batches_per_rollout
        questions //= stage.rollout_batches
        cached = questions * (prompt + stage.outputs_per_question * new)
        if stage.loss.kl_coefficient:
            sizes["reference policy"] = own
        sizes["key-value cache"] = cached * per_token // sampling_shards
    elif isinstance(stage, RewardModelStage):
        texts = 2 if stage.loss == "pairwise" else 1
        count, time = texts * stage.rows_per_step // stage.micro_batches, stage.max_tokens
    else:
        count, time = stage.rows_per_step // stage.micro_batches, stage.row_tokens
    kept = {"full": 1, "dots": 8, "none": 20}[execution.remat] * config.hidden_size
    sizes["activations"] = count * time * config.num_hidden_layers * kept * compute // shards
    chunk = count * min(execution.log_prob_chunk, time) * config.vocab_size * 4 * 2
    sizes["a chunk of logits"] = chunk // shards
    return [{"what": f"{stage.name}: {what}", "bytes": size} for what, size in sizes.items()]


def longest_prompt(
    stage: GRPOStage | EvaluateStage | RejectionSamplingStage, config: RunConfig
) -> int:
    """The tokens that a prompt of the stage may have."""
    names = [stage.data] if isinstance(stage.data, str) else [c.data for c in stage.data]
    if isinstance(stage, GRPOStage) and stage.held_out is not None:
        names.append(stage.held_out)
    sections = [config.data[name] for name in names]
    parts = [config.data[part] for section in sections for part in section.mixture]
    return max(section.max_prompt_tokens for section in sections + parts if not section.mixture)
