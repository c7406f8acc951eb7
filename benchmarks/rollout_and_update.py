"""Tokens/s of the sampler and seconds of a GRPO step on the common workload.

A Qwen3 shape: 4 layers, width 128, 4/2 heads of 32, MLP 512, vocabulary 512, tied, 1.05M weights,
float32; 16 prompts x 8 samples, prompts of 32 tokens, 64 new tokens, no early stop. One GRPO step
is rollout + rewards + reference log-probs + one update.

    python benchmarks/rollout_and_update.py
"""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.grpo import GRPOBatch, GRPOConfig, group_advantages, init_train_state, make_grpo_step
from r1jax.models import Decoder, Execution, ModelConfig, init_params, token_scores
from r1jax.sampler import Prompts, generate
from r1jax.sharding import single_device

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 32, 64


def main() -> None:
    config = ModelConfig(
        "qwen3", 512, 128, 512, 4, 4, 2, 32, rope_theta=10_000.0, tie_word_embeddings=True
    )
    execution = Execution(
        compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=32
    )
    model = Decoder(config, execution, single_device())
    params = init_params(jax.random.key(0), config, model.layout)
    optimizer = optax.adamw(1e-4)
    state = init_train_state(params, optimizer)
    rng = np.random.default_rng(0)
    prompts = Prompts(
        jnp.asarray(rng.integers(3, 512, (PROMPTS, PROMPT_TOKENS)), jnp.int32),
        jnp.full((PROMPTS,), PROMPT_TOKENS, jnp.int32),
        jnp.arange(PROMPTS, dtype=jnp.uint32),
    )
    rows, length = PROMPTS * SAMPLES, PROMPT_TOKENS + NEW_TOKENS
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    segments = jnp.ones((rows, length), jnp.int32)
    mask = (positions >= PROMPT_TOKENS).astype(jnp.float32)

    def log_prob_fn(params: dict, batch: GRPOBatch):  # type: ignore[no-untyped-def,type-arg]
        return token_scores(params, batch.inputs, positions, segments, model)

    step = jax.jit(
        make_grpo_step(log_prob_fn, optimizer, GRPOConfig(kl_coefficient=0.04)), donate_argnums=0
    )
    reference = jax.jit(lambda p, t: token_scores(p, t, positions, segments, model).log_probs)
    rollout = partial(generate, samples=SAMPLES, max_new_tokens=NEW_TOKENS, seed=0)
    reference_params = jax.tree.map(jnp.copy, params)

    for repeat in range(8):
        start = time.perf_counter()
        out = rollout(state.params, prompts, model, step=repeat)
        completions = np.asarray(out.tokens)
        sampled = time.perf_counter()
        rewards = (completions.sum(-1) % 7).astype(np.float32)
        tokens = jnp.concatenate(
            [jnp.repeat(prompts.tokens, SAMPLES, 0), out.tokens.reshape(rows, -1)], axis=1
        )
        drawn = jnp.pad(out.sampling_log_probs.reshape(rows, -1), ((0, 0), (PROMPT_TOKENS, 0)))
        batch = GRPOBatch(
            inputs=tokens,
            mask=mask,
            advantages=group_advantages(jnp.asarray(rewards)).values.reshape(-1),
            reference_log_probs=reference(reference_params, tokens),
            sampler_log_probs=drawn,
        )
        jax.block_until_ready(batch)
        referenced = time.perf_counter()
        state, metrics = step(state, batch)
        gap = float(metrics["sampler/gap_max"])
        end = time.perf_counter()
        print(
            f"generate {rows * NEW_TOKENS / (sampled - start):8.0f} tok/s   "
            f"step {end - start:6.3f} s (rollout {sampled - start:.3f}, reference "
            f"{referenced - sampled:.3f}, update {end - referenced:.3f})   gap {gap:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
