"""A GPU needs no config of its own: what a run compiles is lowered for CUDA, on any machine.

Lowering makes the whole program that XLA is given, with the code of the Triton kernels. Only to
compile that takes a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from r1jax.config.load import load_config
from r1jax.config.run_config import RunConfig
from r1jax.grpo import GRPOBatch
from r1jax.models import Decoder, Execution, abstract_params, choose_attention
from r1jax.models.attention import row_attention
from r1jax.models.config import AttentionKernel, RematPolicy
from r1jax.models.paged_cache import PageList
from r1jax.models.paged_kernel_gpu import CurrentPages, pages_of_slots, softmax_of_slots
from r1jax.run.models import build_decoder
from r1jax.sampler import GenerateOptions, Prompts
from r1jax.sampler.generate import decode_until, start
from r1jax.sharding import make_layout, single_device
from r1jax.stages import supervised
from r1jax.stages.grpo.policy_update import make_update
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.train_step import abstract_train_state, jit_update, make_optimizer

TINY = Path(__file__).parents[1] / "tiny.yaml"
KERNEL = "xla.gpu.triton"
ROWS, TIME = 8, 64


@pytest.fixture(scope="module")
def config() -> RunConfig:
    # A kernel's tiles are not smaller than 16; 64 is the head of a real model.
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    changes = [f"model.config.{name}={value}" for name, value in shape.items()]
    return load_config(str(TINY), ["model.compute_dtype=bfloat16", "model.remat=full", *changes])


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Decoder:
    """The config's, with what `auto` means where the devices are GPUs."""
    decoder, _ = build_decoder(config.model, make_layout(config.mesh.axes, config.mesh.rules))
    attention = choose_attention(config.model.attention, "gpu")
    execution = replace(decoder.execution, attention=attention, scan_layers=True)
    return replace(decoder, execution=execution)


def for_cuda(function: Any, *arguments: Any, **options: Any) -> str:
    """The program as StableHLO."""
    lowered = function.trace(*arguments, **options).lower(lowering_platforms=("cuda",))
    return str(lowered.as_text())


def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def inputs() -> dict[str, jax.ShapeDtypeStruct]:
    names = ("tokens", "positions", "segment_ids")
    return {name: array(jnp.int32, ROWS, TIME) for name in names}


def stage_of(config: RunConfig, kind: type) -> Any:
    return next(stage for stage in config.stages if isinstance(stage, kind))


def lowered_update(config: RunConfig, model: Decoder, kind: type) -> str:
    stage = stage_of(config, kind)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    weights = abstract_params(model.config, model.layout, jnp.float32)
    state = abstract_train_state(weights, optimizer, model.layout)
    per_token = array(jnp.float32, ROWS, TIME)
    if kind is GRPOStage:
        update = make_update(stage, model, optimizer, stage.micro_batches)
        batch: Any = GRPOBatch(
            inputs=inputs(),
            mask=per_token,
            advantages=array(jnp.float32, ROWS),
            old_log_probs=per_token,
            reference_log_probs=per_token,
            sampler_log_probs=per_token,
        )
    else:
        update = supervised.make_update(stage, model, optimizer)
        batch = {**inputs(), "trained": array(jnp.bool_, ROWS, TIME)}
        batch = jax.tree.map(lambda x: array(x.dtype, stage.rows_per_step, TIME), batch)
    return for_cuda(jit_update(update, state), state, batch)


@pytest.mark.parametrize("kind", [GRPOStage, PretrainStage])
def test_updates_are_lowered_with_the_gpu_kernel(
    config: RunConfig, model: Decoder, kind: type
) -> None:
    # Forward, its recomputation, and two of the backward pass, or more.
    assert lowered_update(config, model, kind).count(KERNEL) >= 3


@pytest.mark.parametrize(("attention", "call"), [("flash", KERNEL), ("cudnn", "__cudnn$fmha")])
def test_remat_dots_keeps_what_attention_gave(
    config: RunConfig, model: Decoder, attention: AttentionKernel, call: str
) -> None:
    def kernels(remat: RematPolicy) -> int:
        execution = replace(model.execution, remat=remat, attention=attention)
        changed = replace(model, execution=execution)
        return lowered_update(config, changed, GRPOStage).count(call)

    assert kernels("none") == kernels("dots") < kernels("full")


@pytest.mark.parametrize(
    ("attention", "kernels"), [("flash", 3), ("flash_packed", 3), ("cudnn", 2)]
)
def test_attention_and_its_gradient_are_lowered(attention: Any, kernels: int) -> None:
    """In the shape of Qwen2.5-1.5B; key heads are repeated for the first alone."""
    queries, keys = array(jnp.bfloat16, 8, 2048, 12, 128), array(jnp.bfloat16, 8, 2048, 2, 128)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        execution, layout = Execution(attention=attention), single_device()
        return jnp.sum(row_attention(q, k, v, ids, execution, layout).astype(jnp.float32))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    program = for_cuda(gradient, queries, keys, keys, array(jnp.int32, 8, 2048))
    calls = [line for line in program.splitlines() if "stablehlo.custom_call" in line]
    of_cudnn = [line for line in calls if "__cudnn$" in line]
    chosen = of_cudnn if attention == "cudnn" else [line for line in calls if KERNEL in line]
    assert len(chosen) == kernels
    takes_keys = ["tensor<8x2048x2x128xbf16>" in line for line in chosen]
    assert all(takes_keys) if attention != "flash" else not any(takes_keys)


def test_sampling_is_lowered(model: Decoder) -> None:
    weights = abstract_params(model.config, model.layout, jnp.float32)
    prompts = Prompts(
        array(jnp.int32, 2, 16), *(array(t, 2) for t in (jnp.int32, jnp.uint32, jnp.int32))
    )
    options = GenerateOptions(samples=4, max_new_tokens=8, seed=0)
    draws = jax.eval_shape(options.draws)
    start_ = functools.partial(start, model=model, shape=options.shape(8))
    prefill = for_cuda(start, weights, prompts, draws, **start_.keywords)
    assert KERNEL in prefill
    state, cache = jax.eval_shape(start_, weights, prompts, draws)
    arguments = (weights, state, cache, array(jnp.int32), draws)
    decode = for_cuda(decode_until, *arguments, model=model)
    assert "stablehlo.while" in decode


@pytest.mark.parametrize(("kv_heads", "rows", "width"), [(2, 6, 128), (1, 128, 576)])
def test_pages_are_read_by_a_kernel(kv_heads: int, rows: int, width: int) -> None:
    """Keys and values in the shape of Qwen2.5-1.5B, and latents in that of DeepSeek-V3."""
    slots, listed, page, layers = 4, 32, 64, 2
    pools = (array(jnp.bfloat16, layers, 1, 99, kv_heads, page, width),) * (
        2 if width == 128 else 1
    )
    current = CurrentPages(
        tuple(array(jnp.bfloat16, layers, 1, slots, *pool.shape[3:]) for pool in pools),
        array(jnp.float32, slots, 1, page),
    )
    listed_pages = PageList(
        array(jnp.int32, 1, listed),
        array(jnp.int32, 1, listed),
        array(jnp.bool_, 1, listed, page),
        array(jnp.int32),
    )
    reads = jax.eval_shape(lambda listed: pages_of_slots(listed, slots, rows), listed_pages)
    q = array(jnp.bfloat16, slots, kv_heads, rows, width)
    program = for_cuda(jax.jit(softmax_of_slots), q, pools, current, array(jnp.int32), reads)
    # Slots whose queries fill a product of their own share no page.
    assert program.count(KERNEL) == (2 if rows == 6 else 1)
    # Pages are read in place: of the stack, the kernel is given all layers.
    assert "dynamic_slice" not in program
    assert not any(f"x{page}x{width}x" in line for line in program.splitlines() if "gather" in line)


def test_auto_is_the_kernel_of_the_devices_and_others_are_refused() -> None:
    chosen = {backend: choose_attention("auto", backend) for backend in ("cpu", "gpu", "tpu")}
    assert chosen == {"cpu": "xla", "gpu": "flash", "tpu": "splash"}
    with pytest.raises(ValueError, match="'splash' needs a tpu, this is a gpu; use auto or xla"):
        choose_attention("splash", "gpu")
    for kernel in ("flash", "flash_packed", "cudnn"):
        assert choose_attention(kernel, "gpu") == kernel
        with pytest.raises(ValueError, match=f"'{kernel}' needs a gpu, this is a tpu"):
            choose_attention(kernel, "tpu")
