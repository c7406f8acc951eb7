"""Samples of a queue on a mesh given as JSON; prints them as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from on_a_mesh import CONFIGS, small_buffers

from r1jax.models import Decoder, Execution, init_params
from r1jax.sampler import GenerateOptions, Prompts, generate, make_rollout_weights, to_sample
from r1jax.sampler.queue import QueuedPrompt, QueueFigures, sample_queue
from r1jax.sharding import make_layout, make_rollout_layout

PROMPTS = 16


def main(
    kind: str,
    axes: dict[str, int],
    rollout: dict[str, int],
    rules: dict[str, str],
    scan: bool,
    slots: int | None,
    prompts_of_queue: int = PROMPTS,
) -> dict[str, Any]:
    config = CONFIGS[kind]
    layout = make_layout(axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    execution = Execution(
        compute_dtype=jnp.float32, scan_layers=scan, log_prob_chunk=4, expert_chunk=8
    )
    model = Decoder(config, execution, layout)
    sampler = to_sample(model, make_rollout_layout(layout, rollout, rules))
    params = init_params(jax.random.key(0), config, layout)
    weights = make_rollout_weights(model, sampler)(params)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (PROMPTS, 8)).astype(np.int32)
    lengths = rng.integers(1, 9, PROMPTS).astype(np.int32)
    options = GenerateOptions(
        samples=2,
        max_new_tokens=12,
        seed=1,
        eos_ids=(3, 4, 5),
        record_experts=config.experts is not None,
    )
    steps = 0
    if slots is None:
        prompts = Prompts(tokens, lengths, np.arange(PROMPTS, dtype=np.uint32))
        out = jax.device_get(generate(weights, prompts, sampler, options))
        rows = {(i, j): (out, i, j) for i in range(PROMPTS) for j in range(2)}
        found = {}
        for (i, j), _ in rows.items():
            length = int(out.lengths[i, j])
            experts = None
            if out.experts is not None:
                of_prompt = out.prompt_experts[i, : lengths[i]]
                experts = np.concatenate([of_prompt, out.experts[i, j, :length]])
            log_probs = out.policy_log_probs[i, j, :length]
            found[i, j] = (out.tokens[i, j, :length], log_probs, experts)
    else:
        queue = [QueuedPrompt(tokens[i, : lengths[i]], id=i) for i in range(prompts_of_queue)]
        options = replace(options, slots=slots, page=4, sync_every=5)
        figures = QueueFigures()
        ended = sample_queue(weights, queue, sampler, options, prompt_tokens=8, figures=figures)
        found = {
            (each.prompt, each.sample): (each.tokens, each.policy_log_probs, each.experts)
            for batch in ended
            for each in batch
        }
        steps = figures.steps
    order = sorted(found)
    return {
        "steps": steps,
        "tokens": [found[at][0].tolist() for at in order],
        "log_probs": [found[at][1].tolist() for at in order],
        "experts": [[] if found[at][2] is None else found[at][2].tolist() for at in order],
    }


if __name__ == "__main__":
    small_buffers()
    print(json.dumps([main(*case) for case in json.loads(sys.argv[1])]))
