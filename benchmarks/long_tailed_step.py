"""Seconds of a GRPO step on long-tailed lengths, as a stage takes it.

The common shape of `rollout_and_update.py`, 16 prompts of 32 tokens x 8 samples; 8 of 512 token ids
end a sample, so lengths are geometric with mean 64, and at most 512. A step is a rollout through
slots, rewards, reference log-probs and one update of packed rows. `beside_peers.py` runs it in turn
with other libraries.

    python benchmarks/long_tailed_step.py [--slots N]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from long_tail import EOS_IDS, LONGEST, PROMPT_TOKENS, SAMPLES, common_model, training_sample

from r1jax.grpo import GRPOConfig, group_advantages, init_train_state
from r1jax.models import init_params
from r1jax.sampler import GenerateOptions
from r1jax.sampler.queue import QueuedPrompt, sample_queue
from r1jax.settings.optimizer import OptimizerSection
from r1jax.sharding import from_process_rows, split_cpu
from r1jax.stages.grpo.log_probs import log_prob_rows, make_log_probs
from r1jax.stages.grpo.policy_update import make_update
from r1jax.stages.grpo.rows import pack_updates, packed_shape
from r1jax.stages.grpo.settings import GRPOStage

PROMPTS, STEPS = 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=32)
    slots = parser.parse_args().slots
    split_cpu("cores")
    model = common_model()
    layout = model.layout
    stage = GRPOStage(
        name="rl",
        data="questions",
        steps=STEPS,
        questions_per_step=PROMPTS,
        outputs_per_question=SAMPLES,
        max_new_tokens=LONGEST,
        length_bucket=32,
        loss=GRPOConfig(kl_coefficient=0.04),
        checkpoint_every=STEPS,
        optimizer=OptimizerSection(learning_rate=1e-4),
    )
    shape = packed_shape(stage, PROMPT_TOKENS, layout, layout, step=0)
    optimizer = optax.adamw(1e-4)
    params = init_params(jax.random.key(0), model.config, layout)
    reference_params = jax.tree.map(jnp.copy, params)
    state = init_train_state(params, optimizer)
    log_probs_of = jax.jit(make_log_probs(stage, model, shape.micro_batches))
    update = jax.jit(make_update(stage, model, optimizer, shape.micro_batches), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(11, 512, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)
    prompts = [QueuedPrompt(row, i) for i, row in enumerate(tokens)]

    seconds = []
    for step in range(STEPS):
        start = time.perf_counter()
        options = GenerateOptions(
            SAMPLES, LONGEST, seed=0, step=step, eos_ids=EOS_IDS, slots=min(slots, 128)
        )
        samples = [
            sample
            for ended in sample_queue(
                state.params, prompts, model, options, prompt_tokens=PROMPT_TOKENS
            )
            for sample in ended
        ]
        sampled = time.perf_counter()
        samples.sort(key=lambda each: (each.prompt, each.sample))
        rewards = np.asarray([each.tokens.sum() % 7 for each in samples], np.float32)
        advantages = np.asarray(group_advantages(rewards.reshape(PROMPTS, SAMPLES)).values)
        rows = [
            training_sample(each, tokens, float(advantage))
            for each, advantage in zip(samples, advantages.reshape(-1), strict=True)
        ]
        (batch,) = pack_updates([rows], shape, layout).batches
        batch = jax.tree.map(lambda leaf: from_process_rows(leaf, layout), batch)
        reference = log_probs_of(reference_params, log_prob_rows(batch))
        state, metrics = update(state, replace(batch, reference_log_probs=reference))
        gap = float(metrics["sampler/gap_max"])
        end = time.perf_counter()
        lengths = [len(each.tokens) for each in samples]
        seconds.append(end - start)
        print(
            f"step {end - start:6.3f} s (rollout {sampled - start:.3f}, the rest "
            f"{end - sampled:.3f})   lengths: mean {np.mean(lengths):.0f}, max {max(lengths)}   "
            f"gap {gap:.1e}",
            flush=True,
        )
    print(json.dumps({"step_seconds": seconds}))


if __name__ == "__main__":
    main()
