"""Acceptance, and tokens/s of the sampler with and without drafts, side by side.

A DeepSeek-V3 shape of 5M weights with its module, trained for 150 steps on a random language in
which a token has four successors, so that the module can guess and can be wrong; float32, 4 prompts
of 16 tokens, 128 new ones, temperature 1, no early stop. Drafts are for few samples, where reading
the weights takes longer than computing with them; on a CPU that is hardly ever so.

    python benchmarks/speculative_decoding.py [samples ...]
"""

from __future__ import annotations

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models import (
    Decoder,
    Execution,
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    init_params,
)
from r1jax.sampler import GenerateOptions, Prompts, Samples, generate
from r1jax.settings.optimizer import OptimizerSection
from r1jax.sharding import single_device
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.supervised import make_update
from r1jax.train_step import init_train_state, make_optimizer

VOCAB, PROMPT_TOKENS, NEW_TOKENS, REPEATS = 64, 16, 128, 3
CONFIG = ModelConfig(
    "deepseek_v3",
    VOCAB,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    initializer_range=0.03,
    latent=LatentAttention(
        q_lora_rank=96, kv_lora_rank=96, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=48
    ),
    experts=MixtureOfExperts(
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        first_k_dense_replace=1,
    ),
    num_nextn_predict_layers=1,
)
STAGE = PretrainStage(
    name="language",
    data="",
    steps=150,
    rows_per_step=8,
    row_tokens=48,
    mtp_weight=0.3,
    optimizer=OptimizerSection(learning_rate=3e-3, schedule="cosine", warmup_steps=10),
)


def language(rows: int, time: int, seed: int) -> np.ndarray:
    """int32 [rows, time]: each token has four successors, of probabilities 0.6, 0.2, 0.15, 0.05."""
    successors = np.random.default_rng(0).permuted(np.tile(np.arange(VOCAB), (VOCAB, 1)), axis=1)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, time)).astype(np.int32)
    which = rng.choice(4, (rows, time), p=(0.6, 0.2, 0.15, 0.05))
    for t in range(1, time):
        tokens[:, t] = successors[tokens[:, t - 1], which[:, t]]
    return tokens


def main() -> None:
    execution = Execution(compute_dtype=jnp.float32, remat="none", scan_layers=False)
    model = Decoder(CONFIG, execution, single_device())
    params = init_params(jax.random.key(0), CONFIG, model.layout)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.1f}M weights")
    optimizer = make_optimizer(STAGE.optimizer, STAGE.steps)
    state = init_train_state(params, optimizer)
    update = jax.jit(make_update(STAGE, model, optimizer), donate_argnums=0)
    shape = (STAGE.rows_per_step, STAGE.row_tokens)
    beside = {
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "trained": np.broadcast_to(np.arange(shape[1]) > 0, shape),
    }
    for step in range(STAGE.steps):
        state, metrics = update(state, {"tokens": language(*shape, seed=step), **beside})
        if (step + 1) % 50 == 0:
            shown = ("loss", "mtp/loss", "mtp/acceptance")
            print(f"step {step + 1}", *(f"{name} {float(metrics[name]):.3f}" for name in shown))

    rows = language(4, PROMPT_TOKENS, seed=STAGE.steps)
    ids, lengths = jnp.arange(4, dtype=jnp.uint32), jnp.full(4, PROMPT_TOKENS, jnp.int32)
    prompts = Prompts(jnp.asarray(rows), lengths, ids)
    for samples in [int(word) for word in sys.argv[1:]] or [1, 4]:
        rates: dict[bool, list[float]] = {False: [], True: []}
        drawn: Samples | None = None
        for repeat in range(REPEATS + 1):  # the first compiles
            for speculative in (False, True):
                options = GenerateOptions(
                    samples,
                    NEW_TOKENS,
                    seed=repeat,
                    first_bucket=NEW_TOKENS,
                    speculative=speculative,
                )
                start = time.perf_counter()
                out = generate(state.params, prompts, model, options)
                jax.block_until_ready(out)
                rates[speculative].append(4 * samples * NEW_TOKENS / (time.perf_counter() - start))
                drawn = out
        assert drawn is not None
        plain, drafted = (float(np.median(rates[s][1:])) for s in (False, True))
        steps = float(drawn.drafted.sum())
        print(
            f"{4 * samples:3d} samples: acceptance {float(drawn.accepted.sum()) / steps:.3f}, "
            f"{4 * samples * (NEW_TOKENS - 1) / steps:.2f} tokens a step; without drafts "
            f"{plain:.0f} tok/s, with {drafted:.0f} tok/s: x {drafted / plain:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
