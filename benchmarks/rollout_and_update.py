"""Tokens/s of the sampler and seconds of a GRPO step on the common workload.

A Qwen3 shape: 4 layers, width 128, 4/2 heads of 32, MLP 512, vocabulary 512, tied, 1.05M weights,
float32; 16 prompts x 8 samples, prompts of 32 tokens, 64 new tokens, no early stop. One GRPO step
is rollout + rewards + reference log-probs + one update, which computes each prompt once for its
samples.

    python benchmarks/rollout_and_update.py
"""

from __future__ import annotations

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.grpo import (
    GRPOBatch,
    GRPOConfig,
    PolicyOutputs,
    group_advantages,
    init_train_state,
    make_grpo_step,
)
from r1jax.models import Decoder, Execution, ModelConfig, TokenRows, init_params, token_log_probs
from r1jax.models.parameters import Params
from r1jax.sampler import GenerateOptions, Prompts, generate
from r1jax.sharding import make_layout, split_cpu
from r1jax.train_step import map_micro_batches

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 16, 8, 32, 64
MICRO_BATCHES = 8  # their activations fit into a CPU's caches


def main() -> None:
    split_cpu("cores")
    config = ModelConfig(
        "qwen3", 512, 128, 512, 4, 4, 2, 32, rope_theta=10_000.0, tie_word_embeddings=True
    )
    execution = Execution(
        compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=32
    )
    model = Decoder(config, execution, make_layout({"data": -1}))
    params = init_params(jax.random.key(0), config, model.layout)
    optimizer = optax.adamw(1e-4)
    state = init_train_state(params, optimizer)
    rng = np.random.default_rng(0)
    rows = PROMPTS * SAMPLES
    over_rows = model.layout.sharding(("batch", "time"))

    def place(array: np.ndarray) -> jax.Array:
        axes = ("batch", *(None,) * (array.ndim - 1))
        return jax.device_put(array, model.layout.sharding(axes))

    prompts = Prompts(
        place(rng.integers(3, 512, (PROMPTS, PROMPT_TOKENS)).astype(np.int32)),
        place(np.full(PROMPTS, PROMPT_TOKENS, np.int32)),
        place(np.arange(PROMPTS, dtype=np.uint32)),
    )
    # A row is a prompt and then its samples.
    new = np.tile(np.arange(NEW_TOKENS), SAMPLES) + PROMPT_TOKENS
    of_samples = np.repeat(np.arange(SAMPLES) + 2, NEW_TOKENS)

    def each_row(values: np.ndarray) -> jax.Array:
        return place(np.broadcast_to(values, (PROMPTS, *values.shape)))

    positions = each_row(np.concatenate([np.arange(PROMPT_TOKENS), new]).astype(np.int32))
    segments = np.concatenate([np.ones(PROMPT_TOKENS), of_samples]).astype(np.int32)
    mask, segments = each_row((segments > 1).astype(np.float32)), each_row(segments)
    prompt_of = each_row(np.ones((SAMPLES, PROMPT_TOKENS), bool))
    lengths, sequences = mask * NEW_TOKENS, jnp.float32(rows)

    def log_prob_fn(params: Params, batch: GRPOBatch) -> PolicyOutputs:
        tokens = token_log_probs(params, batch.inputs, model, wanted=batch.mask > 0)
        return PolicyOutputs(tokens.log_probs, tokens.entropy)

    @jax.jit
    def reference(params: Params, inputs: TokenRows, mask: jax.Array) -> jax.Array:
        def log_probs(part: tuple[TokenRows, jax.Array]) -> jax.Array:
            inputs, mask = part
            return token_log_probs(params, inputs, model, wanted=mask > 0).log_probs

        return map_micro_batches(log_probs, (inputs, mask), MICRO_BATCHES)

    @jax.jit
    def join(prompts: Prompts, out: Any) -> tuple[jax.Array, jax.Array]:
        tokens = prompts.tokens, out.tokens.reshape(PROMPTS, -1)
        drawn = jnp.pad(out.sampling_log_probs.reshape(PROMPTS, -1), ((0, 0), (PROMPT_TOKENS, 0)))
        return jax.lax.with_sharding_constraint(
            (jnp.concatenate(tokens, axis=1), drawn), (over_rows, over_rows)
        )

    objective = GRPOConfig(kl_coefficient=0.04)
    step = jax.jit(
        make_grpo_step(log_prob_fn, optimizer, objective, micro_batches=MICRO_BATCHES),
        donate_argnums=0,
    )
    reference_params = jax.tree.map(jnp.copy, params)

    seconds = []
    for repeat in range(8):
        start = time.perf_counter()
        options = GenerateOptions(SAMPLES, NEW_TOKENS, seed=0, step=repeat)
        out = generate(state.params, prompts, model, options)
        completions = np.asarray(out.tokens)
        sampled = time.perf_counter()
        rewards = (completions.sum(-1) % 7).astype(np.float32)
        tokens, drawn = join(prompts, out)
        inputs = TokenRows(tokens, positions, segments, prompt_of=prompt_of)
        advantages = np.asarray(group_advantages(jnp.asarray(rewards)).values)
        batch = GRPOBatch(
            inputs=inputs,
            mask=mask,
            advantages=place(
                np.pad(np.repeat(advantages, NEW_TOKENS, axis=1), ((0, 0), (PROMPT_TOKENS, 0)))
            ),
            reference_log_probs=reference(reference_params, inputs, mask),
            sampler_log_probs=drawn,
            lengths=lengths,
            sequences=sequences,
        )
        jax.block_until_ready(batch)
        referenced = time.perf_counter()
        state, metrics = step(state, batch)
        gap = float(metrics["sampler/gap_max"])
        end = time.perf_counter()
        seconds.append(end - start)
        print(
            f"generate {rows * NEW_TOKENS / (sampled - start):8.0f} tok/s   "
            f"step {end - start:6.3f} s (rollout {sampled - start:.3f}, reference "
            f"{referenced - sampled:.3f}, update {end - referenced:.3f})   gap {gap:.1e}",
            flush=True,
        )
    print(json.dumps({"step_seconds": seconds}))


if __name__ == "__main__":
    main()
