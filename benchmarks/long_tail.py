"""A rollout phase of long-tailed lengths through refilled slots, and its packed updates.

The common shape of `rollout_and_update.py`: 512 prompts of 32 tokens x 8 samples through 64 slots;
8 of 512 token ids end a sample, so lengths are geometric with mean 64, and at most 512. Then four
updates of 1,024 samples. Four figures, of which two are ratios of rates measured in turn:

    slot_use     completion tokens / (decode steps x 64), the end of the phase included
    useful_rate  useful tokens/s / tokens/s of the same engine and queue where all lengths are 128,
                 which gives the same mean context
    plain_rate   that equal-length rate / the rate of `generate`, a batch of 64 rows of 128
    rows_filled  real tokens / positions that the updates compute

    python benchmarks/long_tail.py [--prompts N] [--rounds N] [--json FILE]

The ratios vary with the machine, and with what else runs on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data.prompts import Prompt
from r1jax.models import Decoder, Execution, ModelConfig, init_params
from r1jax.rollouts.sampling import Completion
from r1jax.sampler import GenerateOptions, Prompts, generate
from r1jax.sampler.queue import QueuedPrompt, QueueFigures, QueueSample, sample_queue
from r1jax.settings.optimizer import OptimizerSection
from r1jax.sharding import make_layout, split_cpu
from r1jax.stages.grpo.rows import TrainingSample, pack_updates, packed_shape
from r1jax.stages.grpo.settings import GRPOStage

SAMPLES, PROMPT_TOKENS, SLOTS, LONGEST, EQUAL = 8, 32, 64, 512, 128
UPDATES = 4
EOS_IDS = tuple(range(3, 11))  # 8 of 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    split_cpu("cores")
    model = common_model()
    params = init_params(jax.random.key(0), model.config, model.layout)
    rng = np.random.default_rng(0)
    tokens = rng.integers(11, 512, (arguments.prompts, PROMPT_TOKENS)).astype(np.int32)
    prompts = [QueuedPrompt(row, i) for i, row in enumerate(tokens)]

    def phase(
        eos_ids: tuple[int, ...], longest: int, count: int
    ) -> tuple[float, list[QueueSample], QueueFigures]:
        """Tokens/s, samples and figures."""
        figures, samples = QueueFigures(), []
        options = GenerateOptions(SAMPLES, longest, seed=0, eos_ids=eos_ids, slots=SLOTS)
        begin = time.perf_counter()
        for ended in sample_queue(
            params, prompts[:count], model, options, prompt_tokens=PROMPT_TOKENS, figures=figures
        ):
            samples += ended
        seconds = time.perf_counter() - begin
        return sum(len(each.tokens) for each in samples) / seconds, samples, figures

    rows = SLOTS // SAMPLES
    batch = Prompts(
        *(
            jax.device_put(leaf, model.layout.sharding(("batch",)))
            for leaf in (
                tokens[:rows],
                np.full(rows, PROMPT_TOKENS, np.int32),
                np.arange(rows, dtype=np.uint32),
            )
        )
    )

    def batch_rate() -> float:
        begin = time.perf_counter()
        options = GenerateOptions(SAMPLES, EQUAL, seed=0)
        np.asarray(generate(params, batch, model, options).lengths)
        return SLOTS * EQUAL / (time.perf_counter() - begin)

    equal_count = max(1, arguments.prompts // 4)
    # The number of prompts is part of the programs' shapes: each phase compiles before it is timed.
    batch_rate(), phase((), EQUAL, equal_count), phase(EOS_IDS, LONGEST, arguments.prompts)
    useful, plain = [], []
    for index in range(arguments.rounds):
        batches = statistics.median(batch_rate() for _ in range(3))
        equal, _, _ = phase((), EQUAL, equal_count)
        long, samples, figures = phase(EOS_IDS, LONGEST, arguments.prompts)
        useful.append(long / equal)
        plain.append(equal / batches)
        print(
            f"round {index}: batch {batches:,.0f} tokens/s, slots at equal lengths {equal:,.0f}, "
            f"at long-tailed lengths {long:,.0f} (mean "
            f"{np.mean([len(each.tokens) for each in samples]):.0f}); pages in use / live tokens "
            f"{figures.page_tokens / figures.live_tokens:.2f}",
            flush=True,
        )
    result = {
        "slot_use": figures.slot_use,
        "useful_rate": statistics.median(useful),
        "plain_rate": statistics.median(plain),
        "rows_filled": _rows_filled(samples, tokens, model),
        "cache_per_live_token": figures.page_tokens / figures.live_tokens,
    }
    for name, value in result.items():
        print(f"{name} {value:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result))


def common_model() -> Decoder:
    """The common shape, on all cores."""
    config = ModelConfig(
        "qwen3", 512, 128, 512, 4, 4, 2, 32, rope_theta=10_000.0, tie_word_embeddings=True
    )
    execution = Execution(
        compute_dtype=jnp.float32, remat="none", scan_layers=False, log_prob_chunk=32
    )
    return Decoder(config, execution, make_layout({"data": -1}))


def training_sample(sample: QueueSample, tokens: np.ndarray, advantage: float) -> TrainingSample:
    """tokens: of all prompts [prompts, time]."""
    completion = Completion(
        Prompt(sample.prompt, "", "", tokens[sample.prompt], "", ""),
        sample.sample,
        sample.tokens,
        sample.sampling_log_probs,
        sample.finish,
        text="",
    )
    return TrainingSample(completion, advantage, trained=True)


def _rows_filled(samples: list[QueueSample], tokens: np.ndarray, model: Decoder) -> float:
    questions = len(tokens) // UPDATES
    stage = GRPOStage(
        name="rl",
        data="questions",
        steps=UPDATES,
        questions_per_step=questions,
        outputs_per_question=SAMPLES,
        mini_batches_per_rollout=UPDATES,
        max_new_tokens=LONGEST,
        length_bucket=32,
        checkpoint_every=UPDATES,
        optimizer=OptimizerSection(learning_rate=1e-4),
    )
    in_order = sorted(samples, key=lambda each: (each.prompt, each.sample))
    rows = [training_sample(each, tokens, advantage=1.0) for each in in_order]
    order = np.random.default_rng(0).permutation(len(rows))
    updates = [[rows[i] for i in part] for part in np.array_split(order, UPDATES)]
    shape = packed_shape(stage, PROMPT_TOKENS, model.layout, model.layout, step=0)
    return pack_updates(updates, shape, model.layout).rows_filled


if __name__ == "__main__":
    main()
