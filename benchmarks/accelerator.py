"""Attention, drawing, sampling and updates of a 1.5B model on one accelerator, beside their floors.

Random weights and numbers in the shape of Qwen2.5-1.5B, bfloat16. The least time of --repeats calls
counts, the compiling one left out; a floor is what the given peaks allow.

    attention  rows of --lengths, forward and gradient: the kernels that run here, with several
               segments and padding in each row, and how far they are from XLA's; on a GPU cuDNN's
               too as the public function of JAX gives it, without segments
    draw       a token of each of --slots rows of logits, beside reading the logits once
    decode     `sample_queue`, --slots samples of 8 a prompt, prompts of 256 and 512 new tokens,
               beside reading the weights and the live keys and values once a step
    update     log-probs, and an update of a GRPO step, of 32 x 2,048 and 8 x 8,192 tokens: the
               share of the peak FLOP/s that the model's products are (6 N + attention), what
               compiling took, and the memory of the program and of the process so far

    python benchmarks/accelerator.py [PART ...] --bandwidth 4800 --tflops 989    # an H200
    python benchmarks/accelerator.py update --remat full --micro-batches 4       # and so on
    python benchmarks/accelerator.py --tiny --repeats 1                          # tries the script

A whole step of 32 x 16 samples of 512 tokens is `r1jax run benchmarks/grpo_step.yaml`.

Nothing of it was measured so far.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax.grpo import GRPOBatch, GRPOConfig, PolicyOutputs, init_train_state, make_grpo_step
from r1jax.models import (
    Decoder,
    Execution,
    ModelConfig,
    TokenRows,
    choose_attention,
    init_params,
    right_padded,
    token_log_probs,
)
from r1jax.models.attention import row_attention
from r1jax.models.config import AttentionKernel
from r1jax.models.parameters import Params
from r1jax.models.remat import remat_policy
from r1jax.programs.program import forward_flops
from r1jax.sampler import GenerateOptions
from r1jax.sampler.distribution import Sampling, draw
from r1jax.sampler.queue import QueuedPrompt, QueueFigures, sample_queue
from r1jax.sharding import single_device
from r1jax.train_step import map_micro_batches

Kernel = Callable[..., jax.Array]  # of queries, keys and values

SAMPLES, PROMPT, SEGMENTS = 8, 256, 4
UPDATES = [(32, 2048), (8, 8192)]  # rows, their tokens
PARTS = ("attention", "draw", "decode", "update")
_NO_SEGMENTS = "cuDNN, no segments"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--bandwidth", type=float, default=4800, help="of the memory, GB/s")
    parser.add_argument("--tflops", type=float, default=989, help="of bfloat16 products")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--slots", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--new", type=int, default=512, help="tokens of a sample in `decode`")
    parser.add_argument("--remat", choices=["none", "dots", "full", "auto"], default="auto")
    parser.add_argument("--micro-batches", type=int, help="of `update`; default: 8")
    parser.add_argument("--unrolled", action="store_true", help="layers one after the other")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, short rows")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: give some of {', '.join(PARTS)}")
    if options.tiny:
        options.lengths, options.slots, options.new = [32], [16], 8
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {options}")
    measures: dict[str, Callable[[argparse.Namespace], None]] = {
        "attention": attention, "draw": drawing, "decode": decode, "update": update
    }  # fmt: skip
    for part in options.parts or PARTS:
        measures[part](options)


def model_of(options: argparse.Namespace) -> Decoder:
    layout = single_device()
    execution = Execution(
        param_dtype=jnp.bfloat16,
        attention=choose_attention("auto", layout.platform),
        sampler_attention="xla" if layout.platform == "cpu" else "kernel",
        remat=options.remat,
        device_memory=memory_stats().get("bytes_limit"),
        log_prob_tokens=2048 if layout.platform == "gpu" else 1,
        scan_layers=not options.unrolled,
    )
    if options.tiny:
        config = ModelConfig("qwen2", 64, 32, 64, 2, 4, 2, 8, tie_word_embeddings=True)
    else:
        config = ModelConfig("qwen2", 151_936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True)
    return Decoder(config, execution, layout)


def memory_stats() -> dict[str, int]:
    """Bytes of the device: what JAX may have, and the most that it had; none where it is a CPU."""
    return jax.devices()[0].memory_stats() or {}


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of the fastest call; the first one compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def segments_of(rows: int, length: int) -> jax.Array:
    """Of each row: SEGMENTS of equal length, the last eighth padding."""
    steps = np.arange(length)
    filled = length - length // 8
    ids = np.where(steps < filled, 1 + steps * SEGMENTS // filled, 0)
    return jnp.asarray(np.broadcast_to(ids, (rows, length)), jnp.int32)


def attention(options: argparse.Namespace) -> None:
    for length in options.lengths:
        _attention(options, length)


def _attention(options: argparse.Namespace, length: int) -> None:
    model = model_of(options)
    config = model.config
    rows = 2 if options.tiny else max(1, 16_384 // length)
    keys = jax.random.split(jax.random.key(0), 3)
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    q, k, v = (
        jax.random.normal(key, (rows, length, n, config.head_dim), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    ids = segments_of(rows, length)
    real = (ids > 0)[..., None, None]
    flops = 2 * rows * length**2 * config.num_attention_heads * config.head_dim
    print(f"attention, {rows} x {length}: {flops / 1e9:,.0f} GFLOP forward without segments")
    expected: list[jax.Array] = []
    for name, function in kernels_to_compare(ids, model):
        forward = jax.jit(function)
        gradient = jax.jit(jax.grad(partial(_weighted, function, real), argnums=(0, 1, 2)))
        try:
            taken = [
                1e3 * seconds(partial(f, q, k, v), options.repeats) for f in (forward, gradient)
            ]
        except Exception as error:  # one that cannot run here does not hide the others
            print(f"  {name:20} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        difference = ""
        if name != _NO_SEGMENTS:
            found = [jnp.where(real, forward(q, k, v), 0), *gradient(q, k, v)]
            expected = expected or found
            apart = (relative([a], [b]) for a, b in zip(found, expected, strict=True))
            difference = f", differs by {', '.join(f'{x:.4f}' for x in apart)} (out, q, k, v)"
        print(
            f"  {name:20} forward {taken[0]:8.3f} ms, gradient {taken[1]:8.3f}{difference}",
            flush=True,
        )


def _weighted(function: Kernel, real: jax.Array, *inputs: jax.Array) -> jax.Array:
    out = function(*inputs).astype(jnp.float32)
    return jnp.sum(jnp.where(real, out, 0.0) ** 2)


def kernels_to_compare(ids: jax.Array, model: Decoder) -> Iterator[tuple[str, Kernel]]:
    """Each with its name, XLA's first; all compute the same, but for cuDNN's without segments."""

    def of(kernel: AttentionKernel) -> Kernel:
        execution = replace(model.execution, attention=kernel)
        return lambda q, k, v: row_attention(q, k, v, ids, execution, model.layout)

    of_gpus: list[AttentionKernel] = ["flash", "flash_packed", "cudnn"]
    on_gpu = model.layout.platform == "gpu"
    for kernel in dict.fromkeys(["xla", model.execution.attention, *(of_gpus if on_gpu else [])]):
        yield kernel, of(kernel)
    if on_gpu:
        cudnn = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        yield _NO_SEGMENTS, cudnn


def relative(these: list[jax.Array], those: list[jax.Array]) -> float:
    """The largest difference of two lists of arrays, each beside its array's largest value."""
    pairs = (
        (a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(these, those, strict=True)
    )
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def drawing(options: argparse.Namespace) -> None:
    vocab = model_of(options).config.vocab_size
    for slots in options.slots:
        logits = jax.random.normal(jax.random.key(0), (slots, 1, vocab), jnp.float32)
        keys = jax.random.split(jax.random.key(1), (slots, 1))
        floor = 1e3 * logits.nbytes / options.bandwidth / 1e9
        for name, sampling in ("plain", Sampling()), ("top-p 0.95", Sampling(0.6, 0.95)):
            call = partial(jax.jit(draw), logits, keys, jnp.int32(0), sampling)
            taken = 1e3 * seconds(call, options.repeats)
            print(f"draw {slots} of {vocab:,}, {name}: {taken:.3f} ms, floor {floor:.3f}")


def decode(options: argparse.Namespace) -> None:
    model = model_of(options)
    params = init_params(jax.random.key(0), model.config, model.layout, dtype=jnp.bfloat16)
    for slots in options.slots:
        _decode(options, slots, params, model)


def _decode(options: argparse.Namespace, slots: int, params: Params, model: Decoder) -> None:
    config, rng = model.config, np.random.default_rng(0)
    prompt_tokens = 8 if options.tiny else PROMPT
    prompts = [
        QueuedPrompt(rng.integers(0, config.vocab_size, prompt_tokens).astype(np.int32), i)
        for i in range(slots // SAMPLES)
    ]
    given = GenerateOptions(SAMPLES, options.new, seed=0, slots=slots)
    phases = []

    def phase() -> None:
        phases.append(QueueFigures())
        for _ in sample_queue(
            params, prompts, model, given, prompt_tokens=prompt_tokens, figures=phases[-1]
        ):
            pass

    taken = seconds(phase, options.repeats)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # Keys and values in bfloat16; a prompt's are read once for its samples.
    a_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    live = slots * options.new / 2 + len(prompts) * prompt_tokens
    floor = (weights + a_token * live) / options.bandwidth / 1e9
    step = taken / phases[-1].steps
    print(
        f"decode {slots} slots: {slots * options.new / taken:,.0f} tokens/s, prefill included; "
        f"{1e3 * step:.2f} ms a step, floor {1e3 * floor:.2f}: {floor / step:.0%}",
        flush=True,
    )


def update(options: argparse.Namespace) -> None:
    for rows, length in [(4, 32)] if options.tiny else UPDATES:
        _update(options, rows, length, options.micro_batches or (2 if options.tiny else 8))


def _update(options: argparse.Namespace, rows: int, length: int, micro_batches: int) -> None:
    model = model_of(options)
    params = init_params(jax.random.key(0), model.config, model.layout)
    optimizer = optax.adamw(1e-6)
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, model.config.vocab_size)
    inputs = right_padded(tokens, jnp.full(rows, length))  # all of it is counted as useful
    mask = jnp.ones((rows, length))

    def log_prob_fn(params: Params, batch: GRPOBatch) -> PolicyOutputs:
        found = token_log_probs(params, batch.inputs, model, wanted=batch.mask > 0)
        return PolicyOutputs(found.log_probs, found.entropy)

    @jax.jit
    def log_probs(params: Params) -> jax.Array:
        def part(rows: TokenRows) -> jax.Array:
            return token_log_probs(params, rows, model).log_probs

        return map_micro_batches(part, inputs, micro_batches)

    forward = forward_flops(model.config, rows, length)
    taken = {"log-probs": (forward, seconds(partial(log_probs, params), options.repeats))}
    batch = GRPOBatch(
        inputs=inputs,
        mask=mask,
        advantages=mask * jnp.where(jnp.arange(rows) % 2 > 0, 1.0, -1.0)[:, None],
        reference_log_probs=log_probs(params),
    )
    made = make_grpo_step(
        log_prob_fn, optimizer, GRPOConfig(kl_coefficient=0.001), micro_batches=micro_batches
    )
    state = init_train_state(params, optimizer)
    began = time.perf_counter()
    step = jax.jit(made, donate_argnums=0).lower(state, batch).compile()
    compiled = time.perf_counter() - began

    def one() -> jax.Array:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["optimizer/grad_norm"]

    taken["update"] = 3 * forward, seconds(one, options.repeats)
    for name, (flops, spent) in taken.items():
        share = flops / spent / options.tflops / 1e12
        print(f"{name}, {rows} x {length}: {spent:.3f} s, {share:.1%} of the peak", flush=True)
    policy, program = remat_policy(model, rows // micro_batches, length), step.memory_analysis()
    held, peak = program.argument_size_in_bytes, memory_stats().get("peak_bytes_in_use", 0)
    print(
        f"  {micro_batches} micro-batches, remat {policy}; compiled in {compiled:.0f} s; GiB: "
        f"{held / 2**30:.2f} of arguments, {program.temp_size_in_bytes / 2**30:.2f} of "
        f"temporaries, {peak / 2**30:.2f} the process's peak so far",
        flush=True,
    )


if __name__ == "__main__":
    main()
