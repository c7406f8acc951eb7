"""What a stage compiles, with abstract arguments; and what a kind is given to say it.

The functions are those that the loops call; here they only get arguments. Prompts are as long as
the config lets them be, max_prompt_tokens; so are completions, max_new_tokens, unless the stage
says how long they are (`lengths`).

Left out is what runs once: making, loading and saving states. How often a GRPO stage evaluates, or
a model rewrites, depends on the data: their calls count as 0 in a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.stages import Lowered, Wrapped
from jax.typing import DTypeLike

from r1jax.config.run_config import RunConfig
from r1jax.models import Decoder, ModelConfig, declare
from r1jax.models.parameters import ParamSpec, abstract_weights, is_spec
from r1jax.models.remat import kept_values, remat_policy
from r1jax.programs.lengths import CutLognormal
from r1jax.sampler import to_sample
from r1jax.settings.stage import Stage
from r1jax.sharding import Layout
from r1jax.train_step import TrainStep, abstract_train_state, jit_update

if TYPE_CHECKING:
    from jaxtyping import PyTree

    # Its leaves are `jax.ShapeDtypeStruct`s with shardings.
    AbstractTree: TypeAlias = PyTree


def batch_array(model: Decoder, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """An array whose first dimension is split along the batch."""
    sharding = model.layout.sharding(("batch", *(None,) * (len(shape) - 1)), shape=shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def batch_arrays_like(arrays: Mapping[str, np.ndarray], model: Decoder) -> AbstractTree:
    """Arrays of these shapes and dtypes, each split along the batch."""
    return {name: batch_array(model, array.shape, array.dtype) for name, array in arrays.items()}


def token_arrays(model: Decoder, rows: int, time: int) -> dict[str, jax.ShapeDtypeStruct]:
    """`tokens`, `positions` and `segment_ids`, int32 [rows, time] each."""
    return {
        name: batch_array(model, (rows, time), jnp.int32)
        for name in ("tokens", "positions", "segment_ids")
    }


def expert_choices(model: Decoder, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The experts of tokens of this shape: [..., layers * k], split along the batch."""
    experts = model.config.experts
    assert experts is not None
    width = len(model.config.stacks["layers"]) * experts.num_experts_per_tok
    return batch_array(model, (*shape, width), experts.index_dtype)


def bytes_on_device(tree: AbstractTree) -> int:
    """Bytes of abstract arrays on one device, as they are split."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bytes_by_kind(*named: Mapping[str, AbstractTree]) -> Counter[str]:
    """Bytes on one device by what they are; trees of the same name are added."""
    sizes: Counter[str] = Counter()
    for trees in named:
        for name, tree in trees.items():
            sizes[name] += bytes_on_device(tree)
    return sizes


def forward_flops(
    config: ModelConfig, rows: int, time: float, start: int = 0, *, with_module: bool = False
) -> float:
    """FLOPs of a forward pass, two for each product: weights, and causal attention.

    Args:
      rows, time: tokens read of each row.
      start: tokens of a row that were read before, and are attended to.
      with_module: multi-token prediction is computed, too.
    """
    weights = 0.0
    for path, spec in jax.tree.leaves_with_path(declare(config), is_leaf=is_spec):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        used = math.prod(spec.shape) * _used(spec, config)
        if name.startswith("prediction."):
            weights += used * with_module
        elif name == "unembed" or (name == "embed" and config.head == "language"):
            # Looking tokens up is no product; a tied table is the output matrix, too.
            is_head = name == "unembed" or config.tie_word_embeddings
            weights += used * is_head * (1 + with_module)
        elif name != "embed":
            weights += used
    seen = time * start + time * (time + 1) / 2
    # Queries with keys, and weights with values.
    width = config.num_attention_heads * (config.head_dim + config.v_head_dim)
    layers = config.num_hidden_layers + with_module
    return 2.0 * rows * (time * weights + layers * width * seen)


def expected_flops(
    config: ModelConfig, rows: int, lengths: CutLognormal, *, start: int = 0, before: int = 0
) -> float:
    """FLOPs of a forward pass over rows of such lengths, see `forward_flops`.

    Args:
      before: tokens of each row that are read, too.
    """
    variance = lengths.moment(2) - lengths.mean**2
    # They are a polynomial of degree 2 in the length, and 0 for none.
    square = forward_flops(config, rows, 2) / 2 - forward_flops(config, rows, 1)
    return forward_flops(config, rows, before + lengths.mean, start) + square * variance


def _used(spec: ParamSpec, config: ModelConfig) -> float:
    """The part of a weight that a token is multiplied by: of the routed experts, the chosen."""
    if not spec.per_expert or config.experts is None:
        return 1.0
    return config.experts.num_experts_per_tok / config.experts.n_routed_experts


@dataclass(frozen=True)
class Program:
    """One compiled function of a stage.

    mesh: axis -> size, of the layout that it runs over.
    lower: returns it, lowered for the mesh.
    arguments: its arguments, by what they are: `weights`, `optimizer`, `cache`, `batch`, ...
    resident: what else is in memory at the time.
    calls: in a step of the stage; 0 where that depends on the data.
    makes: what its results are, where they are new.
    turns: of its data-dependent loop in a call (a loop that decodes token by token).
    larger_branch: whether conditionals take their larger branch: sampling does where it sorts the
        vocabulary.
    useful_flops: of the model in a call, on all devices together; recomputed products do not count.
    temporaries: bytes on a device of the largest arrays that it makes and frees, by what they are;
        an estimate, for those who do not compile.
    prepare: changes arbitrary arguments into some with which the program does its work.
    trial_turns: of that loop, with the arguments of `prepare`.
    scopes: of other loops and conditionals that the data decides on, see `planner.hlo.cost`.
    """

    name: str
    mesh: Mapping[str, int]
    lower: Callable[[], Lowered]
    arguments: Mapping[str, AbstractTree]
    resident: Mapping[str, AbstractTree]
    calls: float
    makes: str = "outputs"
    turns: float = 1.0
    larger_branch: bool = True
    useful_flops: float = 0.0
    temporaries: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[PyTree], PyTree] = lambda arguments: arguments
    trial_turns: float = 1.0
    scopes: Mapping[str, float] = field(default_factory=dict)

    @property
    def devices(self) -> tuple[jax.Device, ...]:
        """Those that it runs on, in the order of its mesh; none where no argument says it."""
        for leaf in jax.tree.leaves(dict(self.arguments)):
            if isinstance(leaf.sharding, NamedSharding):
                return tuple(leaf.sharding.mesh.devices.flat)
        return ()


@dataclass(frozen=True)
class StagePrograms:
    """What a stage calls in a step: an update, or for stages that only sample, a batch.

    tokens: sampled or trained on in a step. unit: what a step is.
    notes: lines about slots, pages and packing. limits: about the most that a step may take.
    """

    programs: tuple[Program, ...]
    tokens: int
    unit: str = "step"
    notes: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planning:
    """What the `programs` of a kind needs beside the stage's settings.

    decoder_of: the decoder of a stage's weights, of a model by its name, or of a directory.
    rollout_layout: the devices, arranged for sampling.
    """

    config: RunConfig
    decoder_of: Callable[[str], Decoder]
    rollout_layout: Layout

    def sampler_of(self, name: str) -> Decoder:
        """As `decoder_of`, arranged for sampling, its weights in the dtype that it computes in."""
        return to_sample(self.decoder_of(name), self.rollout_layout)


def longest_prompt(stage: Stage, config: RunConfig) -> int:
    """The tokens that a prompt of the stage may have."""
    sections = [config.data[name] for name in stage.prompt_datasets()]
    parts = [config.data[part] for section in sections for part in section.mixture]
    return max(section.max_prompt_tokens for section in sections + parts if not section.mixture)


@dataclass(frozen=True)
class TrainBatch:
    """The batch of an update.

    arrays: the update's argument beside its state.
    rows, time: texts that the model reads, and tokens of each at most, by which FLOPs and memory
        are counted; the arrays may be padded further.
    micro_batches: equal parts, which pass through the model one after the other.
    teacher: reads the rows, too; its weights are the update's last argument.
    """

    arrays: AbstractTree
    rows: int
    time: int
    micro_batches: int = 1
    teacher: Decoder | None = None


def train_programs(
    update: TrainStep[PyTree],
    optimizer: optax.GradientTransformation,
    model: Decoder,
    batch: TrainBatch,
    *,
    with_module: bool = False,
    held_out: tuple[Wrapped, tuple[AbstractTree, ...]] | None = None,
) -> StagePrograms:
    """The programs of a stage whose step is one update.

    Args:
      with_module: as of `update_program`.
      held_out: the compiled loss on held-out rows, and its arguments beside the weights; the number
        of its batches depends on the data.
    """
    program = update_program(update, optimizer, model, batch, with_module=with_module)
    programs = [program]
    if held_out is not None:
        (loss, arrays), weights = held_out, program.arguments["weights"]
        programs += [
            Program(
                "held-out loss",
                program.mesh,
                partial(loss.lower, weights, *arrays),
                {"weights": weights, "batch": arrays},
                {"optimizer": program.arguments["optimizer"]},
                calls=0,
                useful_flops=forward_flops(model.config, batch.rows, batch.time),
            )
        ]
    tokens = batch.rows * batch.time
    return StagePrograms(tuple(programs), tokens, limits=remat_limits(model, batch))


def remat_limits(model: Decoder, batch: TrainBatch) -> tuple[str, ...]:
    """What `remat: auto` is in the update, as `StagePrograms` shows it."""
    if model.execution.remat != "auto":
        return ()
    rows = batch.rows // batch.micro_batches
    policy = remat_policy(model, rows, batch.time)
    line = f"remat: auto is {policy} for micro-batches of {rows:,} rows of {batch.time:,} tokens"
    unknown = model.execution.device_memory is None
    return (f"{line}, as the devices' memory is not known" if unknown else line,)


def update_program(
    update: TrainStep[PyTree],
    optimizer: optax.GradientTransformation,
    model: Decoder,
    batch: TrainBatch,
    *,
    resident: Mapping[str, AbstractTree] | None = None,
    with_module: bool = False,
) -> Program:
    """One update.

    Args:
      update: (state, batch, and a teacher's weights) -> (state, metrics), as the loop compiles it.
      resident: what is in memory beside the train state and the batch.
      with_module: the module for multi-token prediction is trained, too.
    """
    state = abstract_train_state(abstract_weights(model), optimizer, model.layout)
    flops = 3 * forward_flops(model.config, batch.rows, batch.time, with_module=with_module)
    teacher: dict[str, AbstractTree] = {}
    if batch.teacher is not None:
        teacher = {"teacher": abstract_weights(batch.teacher)}
        flops += forward_flops(batch.teacher.config, batch.rows, batch.time)
    return Program(
        "update",
        model.layout.mesh.shape,
        partial(jit_update(update, state).lower, state, batch.arrays, *teacher.values()),
        {"weights": state.params, "optimizer": state.opt_state, "batch": batch.arrays, **teacher},
        {} if resident is None else resident,
        calls=1,
        useful_flops=flops,
        temporaries=_temporaries(model, batch),
    )


def _temporaries(model: Decoder, batch: TrainBatch) -> dict[str, int]:
    """Gradients, the activations that remat keeps, and a chunk of logits with its gradients."""
    config, execution = model.config, model.execution
    shards, rows = model.layout.shards("batch"), batch.rows // batch.micro_batches
    policy = remat_policy(model, rows, batch.time)
    values = rows * batch.time * kept_values(config, policy)
    sizes = {
        "gradients": bytes_on_device(abstract_weights(model)),
        "activations": values * jnp.dtype(execution.compute_dtype).itemsize // shards,
    }
    if config.head == "language":
        steps = execution.logit_steps(max(1, rows // shards), batch.time)
        chunk = rows * steps * config.vocab_size
        sizes["a chunk of logits"] = chunk * 4 * (2 if batch.teacher is None else 4) // shards
    return sizes
