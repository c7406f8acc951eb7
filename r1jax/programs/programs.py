"""The compiled functions that a stage calls, with arguments that have shapes and shardings only.

The functions are the stages' and the sampler's own; here they are only given arguments. Texts are
as long as the config lets them be: prompts of max_prompt_tokens, completions of max_new_tokens.

Left out is what runs once: making, loading and saving states. How often a GRPO stage evaluates, or
a model rewrites, is the data's business: their calls count as 0 in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.stages import Lowered
from jax.typing import DTypeLike

from r1jax.config.run_config import RunConfig
from r1jax.data.preferences import EncodedPreference, pad_texts, preference_arrays
from r1jax.grpo import GRPOBatch
from r1jax.models import Decoder, ModelConfig, abstract_params, declare
from r1jax.models.decoder import cache_axes, new_cache_arrays, remembered
from r1jax.models.parameters import ParamSpec, is_spec
from r1jax.planner.compiler import Binary, Compiler, DoesNotFit, NotPlanned
from r1jax.planner.dry_run import longest_prompt
from r1jax.rollouts import scoring as judge
from r1jax.rollouts.sampling import bucket
from r1jax.run.expert_balance import check_experts
from r1jax.run.optimizer import make_optimizer
from r1jax.sampler import Prompts, Sampling, reads_as_is, to_sample
from r1jax.sampler.generate import capacities_of, decode_until, grow, start
from r1jax.sampler.options import FIRST_CAPACITY
from r1jax.sampler.rollout_weights import weights_mover
from r1jax.sampler.speculative import (
    decode_speculatively,
    grow_speculation,
    start_speculatively,
)
from r1jax.settings.rewards import RewardSection
from r1jax.settings.sampling import SamplingSection
from r1jax.settings.stage import Stage
from r1jax.sharding import Axes, Layout
from r1jax.stages import supervised_programs as supervised
from r1jax.stages.evaluate.settings import EvaluateStage
from r1jax.stages.grpo import programs as grpo
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.pretrain.settings import PretrainStage
from r1jax.stages.rejection_sampling.settings import ModelRewrite, RejectionSamplingStage
from r1jax.stages.reward_model import programs as reward_model
from r1jax.stages.reward_model.settings import RewardModelStage
from r1jax.stages.sft.settings import SFTStage
from r1jax.train_step import abstract_train_state, jit_update

# The decoder of a stage's, or a model's, weights.
DecoderOf = Callable[[str], Decoder]


@dataclass(frozen=True)
class Program:
    """One compiled function of a stage.

    mesh: axis -> size, of the layout that it runs over.
    lower: gives it, lowered for the mesh; may need others to be compiled first (`DoesNotFit`).
    arguments: what it is given, by what it is: `weights`, `optimizer`, `cache`, `batch`, ...
    resident: what else is in memory at the time.
    makes: what its results are, where they are new.
    calls: in a step of the stage; 0 where that depends on the data.
    turns: of its data-dependent loop in a call (a loop that decodes token by token).
    larger_branch: whether conditionals take their larger branch: sampling does where it sorts the
        vocabulary.
    useful_flops: of the model in a call, on all devices together; recomputed products do not count.
    prepare: makes of arbitrary arguments some with which the program does its work.
    trial_turns: of that loop, with what `prepare` gives.
    """

    name: str
    mesh: Mapping[str, int]
    lower: Callable[[], Lowered]
    arguments: Mapping[str, Any]
    resident: Mapping[str, Any]
    calls: float
    makes: str = "outputs"
    turns: float = 1.0
    larger_branch: bool = True
    useful_flops: float = 0.0
    prepare: Callable[[Any], Any] = lambda arguments: arguments
    trial_turns: float = 1.0


@dataclass(frozen=True)
class StagePrograms:
    """What a stage calls in a step: an update, or for stages that only sample, a batch.

    tokens: sampled or trained on in a step. unit: what a step is.
    """

    programs: tuple[Program, ...]
    tokens: int
    unit: str = "step"


def stage_programs(
    stage: Stage,
    config: RunConfig,
    decoder_of: DecoderOf,
    rollout_layout: Layout,
    compiler: Compiler,
) -> StagePrograms:
    """The programs of one stage."""
    model = decoder_of(stage.name)
    sampler = to_sample(model, rollout_layout)
    if isinstance(stage, GRPOStage):
        return _grpo(stage, config, model, sampler, decoder_of, compiler)
    if isinstance(stage, PretrainStage | SFTStage):
        return _supervised(stage, model)
    if isinstance(stage, RewardModelStage):
        return _reward_model(stage, model)
    return _sampling(stage, config, sampler, decoder_of, compiler)


# --- Stages --------------------------------------------------------------------------------------


def _grpo(
    stage: GRPOStage,
    config: RunConfig,
    model: Decoder,
    sampler: Decoder,
    decoder_of: DecoderOf,
    compiler: Compiler,
) -> StagePrograms:
    prompt = longest_prompt(stage, config)
    limit = stage.max_new_tokens
    new = limit if isinstance(limit, int) else max(change.tokens for change in limit)
    phase, group = stage.mini_batches_per_rollout, stage.outputs_per_question
    questions = stage.questions_per_step * phase // stage.rollout_batches
    with_reference = stage.loss.kl_coefficient > 0

    optimizer = make_optimizer(stage.optimizer, stage.steps)
    weights = _weights(model)
    state = abstract_train_state(weights, optimizer, model.layout)
    reference = {"reference": weights} if with_reference else {}
    judges = _judges(config.rewards_of(stage), config, decoder_of)
    beside = {**reference, "reward models": [_weights(each) for each, _ in judges.values()]}

    rows, time = stage.questions_per_step * group, _round_up(prompt + new, stage.length_bucket)
    inputs = {
        name: _rows(model, (rows, time), jnp.int32)
        for name in ("tokens", "positions", "segment_ids")
    }
    check_experts(stage.name, stage.balance, model.config, replay_experts=stage.replay_experts)
    if stage.replay_experts:
        inputs["experts"] = _recorded(model, (rows, time))
    per_token = _rows(model, (rows, time), jnp.float32)
    batch = GRPOBatch(
        inputs=inputs,
        mask=per_token,
        advantages=_rows(model, (rows,), jnp.float32),
        old_log_probs=per_token if phase > 1 else None,
        reference_log_probs=per_token if with_reference else None,
        sampler_log_probs=per_token,
    )
    forward = forward_flops(model.config, rows, prompt + new)
    rollout = Rollout(
        sampler, questions, group, prompt, new, stage.sampling, compiler, stage.replay_experts
    )
    resident = {**beside, "optimizer": state.opt_state}
    programs: list[Program] = []
    held = resident
    if not reads_as_is(model, sampler):
        move = weights_mover(model, sampler)
        programs.append(
            Program(
                "weights to the sampler",
                sampler.layout.mesh.shape,
                partial(move.lower, weights),
                {"weights": weights},
                resident,
                calls=1 / phase,
                makes="sampler's weights",
            )
        )
        held = {**resident, "policy": weights}
    programs += rollout.programs(held, stage.rollout_batches / phase)
    evaluated = math.gcd(stage.held_out_samples, group)
    if stage.held_out is not None and evaluated != group:  # else they are the rollout's own
        sampling = stage.held_out_sampling
        held_out = Rollout(sampler, questions, evaluated, prompt, new, sampling, compiler)
        programs += _now_and_then(held_out.programs(held, 0.0), "held-out")
    programs += _reward_programs(judges, prompt + new, rows, {**resident, "weights": state.params})
    if with_reference or phase > 1:
        score = jax.jit(grpo.make_score(stage, model))
        programs.append(
            Program(
                "log-probs",
                model.layout.mesh.shape,
                partial(score.lower, weights, inputs),
                {"weights": weights, "batch": inputs},
                {**resident, "batch": [replace(batch, inputs=None), *[batch] * (phase - 1)]},
                calls=with_reference + (phase > 1),
                useful_flops=forward,
            )
        )
    update = jit_update(grpo.make_update(stage, model, optimizer), state)
    programs.append(
        Program(
            "update",
            model.layout.mesh.shape,
            partial(update.lower, state, batch),
            {"weights": state.params, "optimizer": state.opt_state, "batch": batch},
            {**beside, "batch": [batch] * (phase - 1)},
            calls=1,
            useful_flops=3 * forward,
        )
    )
    return StagePrograms(tuple(programs), rows * new)


def _supervised(stage: PretrainStage | SFTStage, model: Decoder) -> StagePrograms:
    shape = (stage.rows_per_step, stage.row_tokens)
    batch = {
        **{name: _rows(model, shape, jnp.int32) for name in ("tokens", "positions", "segment_ids")},
        "trained": _rows(model, shape, jnp.bool_),
    }
    # Its number of steps only shapes the learning rate.
    optimizer = make_optimizer(stage.optimizer, stage.steps or 1)
    forward = forward_flops(model.config, *shape, with_module=bool(stage.mtp_weight))
    programs = [
        _update(supervised.make_update(stage, model, optimizer), optimizer, model, batch, forward)
    ]
    if isinstance(stage, SFTStage) and stage.held_out is not None:
        measure = jax.jit(partial(supervised.loss_sums, model=model))
        forward = forward_flops(model.config, *shape)
        programs.append(_measure(measure, (batch,), programs[0], forward))
    return StagePrograms(tuple(programs), math.prod(shape))


def _reward_model(stage: RewardModelStage, model: Decoder) -> StagePrograms:
    text = np.zeros(stage.max_tokens, np.int32)
    pairs = stage.loss == "pairwise"
    row = EncodedPreference(0, (text, text) if pairs else (text,), None if pairs else True)
    time = _round_up(stage.max_tokens, stage.length_bucket)
    batch = _like(preference_arrays([row] * stage.rows_per_step, time), model)
    optimizer = make_optimizer(stage.optimizer, stage.steps or 1)
    texts = stage.rows_per_step * len(row.texts)
    forward = forward_flops(model.config, texts, stage.max_tokens)
    programs = [
        _update(reward_model.make_update(stage, model, optimizer), optimizer, model, batch, forward)
    ]
    if stage.held_out is not None:
        weights = _rows(model, (stage.rows_per_step,), jnp.float32)
        measure = jax.jit(partial(reward_model.weighted_loss, model=model))
        programs.append(_measure(measure, (batch, weights), programs[0], forward))
    return StagePrograms(tuple(programs), texts * stage.max_tokens)


def _sampling(
    stage: EvaluateStage | RejectionSamplingStage,
    config: RunConfig,
    model: Decoder,
    decoder_of: DecoderOf,
    compiler: Compiler,
) -> StagePrograms:
    if isinstance(stage, EvaluateStage):
        samples = stage.samples_per_batch or stage.samples_per_problem
        asked = stage.problems_per_batch
    else:
        samples, asked = stage.samples_per_prompt, stage.prompts_per_batch
    prompt, new = longest_prompt(stage, config), stage.max_new_tokens
    judges = _judges(config.rewards_of(stage), config, decoder_of)
    beside = {"reward models": [_weights(each) for each, _ in judges.values()]}
    rollout = Rollout(model, asked, samples, prompt, new, stage.sampling, compiler)
    programs = list(rollout.programs(beside, 1.0))
    resident = {**beside, "weights": _weights(model)}
    programs += _reward_programs(judges, prompt + new, asked * samples, resident)
    if isinstance(stage, RejectionSamplingStage) and isinstance(stage.rewrite, ModelRewrite):
        section = stage.rewrite
        # It is asked about a question and an answer, each as long as may be, and alone in memory.
        rewriter = Rollout(
            to_sample(decoder_of(section.weights), model.layout),
            section.drafts_per_batch,
            1,
            prompt + new,
            section.max_new_tokens,
            section.sampling,
            compiler,
        )
        programs += _now_and_then(rewriter.programs({}, 0.0), "rewrite:")
    return StagePrograms(tuple(programs), asked * samples * new, "batch")


def _now_and_then(programs: Iterator[Program], prefix: str) -> list[Program]:
    """Programs of another part of a stage, whose calls are the data's."""
    return [replace(each, name=f"{prefix} {each.name}") for each in programs]


def _update(
    update: Callable[..., Any], optimizer: Any, model: Decoder, batch: Any, forward: float
) -> Program:
    state = abstract_train_state(_weights(model), optimizer, model.layout)
    return Program(
        "update",
        model.layout.mesh.shape,
        partial(jit_update(update, state).lower, state, batch),
        {"weights": state.params, "optimizer": state.opt_state, "batch": batch},
        {},
        calls=1,
        useful_flops=3 * forward,
    )


def _measure(measure: Any, rows: tuple[Any, ...], update: Program, forward: float) -> Program:
    """A held-out loss, whose number of batches is the data's."""
    weights = update.arguments["weights"]
    return Program(
        "held-out loss",
        update.mesh,
        partial(measure.lower, weights, *rows),
        {"weights": weights, "batch": rows},
        {"optimizer": update.arguments["optimizer"]},
        calls=0,
        useful_flops=forward,
    )


# --- Rollouts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """The sampler's programs for a batch of prompts.

    The cache doubles as it fills, and each of its sizes is a program of its own. Two are compiled,
    with the first and the last size: what a token costs is a constant and a share of the size, so
    each of the two is given as many tokens (`turns`) as make the sum right.
    """

    model: Decoder
    prompts: int
    samples: int
    prompt_tokens: int
    new_tokens: int
    sampling: SamplingSection
    compiler: Compiler
    record_experts: bool = False

    def programs(self, resident: Mapping[str, Any], calls: float) -> Iterator[Program]:
        config, capacities = self.model.config, self.capacities
        weights = _weights(self.model)
        yield Program(
            "prefill",
            self.model.layout.mesh.shape,
            lambda: self.prefill,
            {"weights": weights, "batch": self.arguments},
            resident,
            calls,
            makes="cache",
            useful_flops=forward_flops(config, self.prompts, self.prompt_tokens),
        )
        rows = self.prompts * self.samples
        decoding = forward_flops(config, rows, self.new_tokens, self.prompt_tokens)
        for capacity, turns in token_counts(capacities).items():
            yield Program(
                "decode" if len(capacities) == 1 else f"decode, cache of {capacity}",
                self.model.layout.mesh.shape,
                partial(self.decode, capacity),
                {"weights": weights, "cache": [self.new_cache(capacity), self.prompt_cache]},
                resident,
                calls,
                turns=turns,
                larger_branch=self.sampling.top_p < 1 or self.sampling.top_k > 0,
                useful_flops=decoding * turns / self.new_tokens,
                prepare=partial(prepare_decoding, capacity=capacity),
                trial_turns=min(capacity, _TRIAL_TOKENS),
            )
        if len(capacities) > 1:
            before, last = capacities[-2:]
            moved = sum(a + b for a, b in zip(capacities, capacities[1:], strict=False))
            yield Program(
                "grow the cache",
                self.model.layout.mesh.shape,
                lambda: self.grow(before, last),
                {"cache": self.new_cache(before)},
                {**resident, "weights": weights, "cache": self.prompt_cache},
                calls * moved / (last + before),
                makes="cache",
            )

    @cached_property
    def capacities(self) -> list[int]:
        # Drafts are planned for as if none stayed: of memory the most, of time no gain.
        steps = max(1, self.new_tokens - 1) if self.sampling.speculative else self.new_tokens
        return list(capacities_of(steps, min(FIRST_CAPACITY, steps)))

    @cached_property
    def rows(self) -> int:
        """Prompts, padded as `pad_prompts` pads them."""
        return _round_up(self.prompts, self.model.layout.shards("batch"))

    @cached_property
    def arguments(self) -> Prompts:
        def rows(dtype: DTypeLike, *more: int) -> jax.ShapeDtypeStruct:
            return _rows(self.model, (self.rows, *more), dtype)

        time = bucket(self.prompt_tokens)
        return Prompts(rows(jnp.int32, time), rows(jnp.int32), rows(jnp.uint32), rows(jnp.int32))

    @cached_property
    def prefill(self) -> Lowered:
        return self._start.lower(*self._start_arguments, **self._start_options(self.capacities[0]))

    @property
    def _start(self) -> Any:
        return start_speculatively if self.sampling.speculative else start

    def grow(self, before: int, after: int) -> Lowered:
        state, _ = self.started(before)
        if self.sampling.speculative:
            return grow_speculation.lower(state, after - before, self.model)
        return grow.lower(state.cache, after - before, self.model)

    def decode(self, capacity: int) -> Lowered:
        state, prompt_cache = self.started(capacity)
        advance = decode_speculatively if self.sampling.speculative else decode_until
        return advance.lower(
            _weights(self.model),
            state,
            prompt_cache,
            self.arguments.lengths,
            jax.ShapeDtypeStruct((), jnp.int32),
            *self._drawing,
            model=self.model,
        )

    @property
    def _drawing(self) -> tuple[Any, ...]:
        real, whole = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32))
        return Sampling(real, real, whole, real), jax.ShapeDtypeStruct((1,), jnp.int32)

    def started(self, capacity: int) -> Any:
        """The sampler's state and the prompts' cache, as the prefill would leave them.

        Their shardings are the compiler's choice.

        Raises:
          NotPlanned: the prefill does not fit.
        """
        try:
            binary = self.compiler(self.prefill)
        except DoesNotFit as error:
            raise NotPlanned(
                "what it reads is laid out by the prefill, which does not fit"
            ) from error
        begin = partial(self._start, **self._start_options(capacity))
        return _placed(jax.eval_shape(begin, *self._start_arguments), binary, self.model.layout)

    def _start_options(self, capacity: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "count": self.samples,
            "capacity": capacity,
            "max_new_tokens": self.new_tokens,
            **({} if self.sampling.speculative else {"record_experts": self.record_experts}),
        }

    @cached_property
    def _start_arguments(self) -> tuple[Any, ...]:
        seed = jax.ShapeDtypeStruct((), jnp.uint32)
        arguments = (_weights(self.model), self.arguments, seed, seed)
        return (*arguments, *self._drawing) if self.sampling.speculative else arguments

    def new_cache(self, capacity: int) -> list[Any]:
        """What is remembered of the new tokens, as the layout splits it."""
        entries = 2 * capacity if self.sampling.speculative else capacity
        arrays = new_cache_arrays(self.rows, self.samples, entries, self.model)
        return self._remembered(arrays, (self.rows, self.samples, entries))

    @cached_property
    def prompt_cache(self) -> list[Any]:
        """And of the prompts."""
        time, axes = bucket(self.prompt_tokens), cache_axes(self.model.config, new=False)
        arrays = [
            ((self.rows, heads, time, width), axes) for heads, width in remembered(self.model)
        ]
        return self._remembered(arrays, (self.rows, time))

    def _remembered(
        self, arrays: Sequence[tuple[tuple[int, ...], Axes]], tokens: tuple[int, ...]
    ) -> list[Any]:
        """Of all layers; and of the tokens of this shape, the experts that they chose."""
        config, dtype = self.model.config, self.model.execution.compute_dtype
        leaves = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=self.model.layout.sharding(axes))
            for shape, axes in arrays
        ] * (config.num_hidden_layers + self.sampling.speculative)
        return [*leaves, _recorded(self.model, tokens)] if self.record_experts else leaves


_TRIAL_TOKENS = 32


def prepare_decoding(arguments: Any, capacity: int) -> Any:
    """Some tokens of every sample, at the end of a full cache; no sample ends before."""
    weights, state, prompt_cache, lengths, until, sampling, eos_ids = arguments
    first = capacity - min(capacity, _TRIAL_TOKENS)
    state = state.replace(step=jnp.full_like(state.step, first))
    one = jnp.ones_like(sampling.temperature)
    sampling = sampling.replace(temperature=one, top_p=one)
    until = jnp.full_like(until, capacity)
    return weights, state, prompt_cache, lengths, until, sampling, jnp.full_like(eos_ids, -1)


def token_counts(capacities: list[int]) -> dict[int, float]:
    """How many tokens to give to the first and to the last capacity of a cache.

    Args:
      capacities: rising; as many tokens as the last says are decoded, each with the smallest cache
        that has room for it.

    Returns:
      Capacity -> tokens. With them, a sum of costs that are linear in the capacity is exact.
    """
    first, last = capacities[0], capacities[-1]
    if first == last:
        return {first: float(first)}
    counts = {first: 0.0, last: 0.0}
    done = 0
    for capacity in capacities:
        tokens, done = capacity - done, capacity
        share = (capacity - first) / (last - first)
        counts[first] += tokens * (1 - share)
        counts[last] += tokens * share
    return counts


# --- Reward models -------------------------------------------------------------------------------


def _judges(
    rewards: Mapping[str, RewardSection], config: RunConfig, decoder_of: DecoderOf
) -> dict[str, tuple[Decoder, bool]]:
    """Reward -> its model, and whether its score becomes a probability; rules have none."""
    kinds = {stage.name: stage for stage in config.stages}
    found: dict[str, tuple[Decoder, bool]] = {}
    for name, reward in rewards.items():
        if reward.model is not None:
            stage = kinds.get(reward.model)
            pointwise = isinstance(stage, RewardModelStage) and stage.loss == "pointwise"
            found[name] = (decoder_of(reward.model), pointwise)
    return found


def _reward_programs(
    judges: Mapping[str, tuple[Decoder, bool]],
    tokens: int,
    samples: int,
    resident: Mapping[str, Any],
) -> Iterator[Program]:
    """Scores of so many samples of so many tokens, all of which every reward model reads."""
    for name, (model, as_probability) in judges.items():
        rows = judge.rows_at_once(model.layout)
        texts = [np.zeros(1, np.int32)] * rows
        inputs = _like(pad_texts(texts, judge.row_tokens(tokens)), model)
        score = jax.jit(judge.make_score(model, as_probability))
        others = [_weights(other) for key, (other, _) in judges.items() if key != name]
        yield Program(
            f"reward {name}",
            model.layout.mesh.shape,
            partial(score.lower, _weights(model), inputs),
            {"reward models": _weights(model), "batch": inputs},
            {**resident, "reward models": others},
            calls=samples / rows,
            useful_flops=forward_flops(model.config, rows, tokens),
        )


# --- Arrays that are not there -------------------------------------------------------------------


def _weights(model: Decoder) -> Any:
    return abstract_params(model.config, model.layout, model.execution.param_dtype)


def _rows(model: Decoder, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """An array split along the batch."""
    sharding = model.layout.sharding(("batch", *(None,) * (len(shape) - 1)), shape=shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _recorded(model: Decoder, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The experts of tokens [..., layers * k], split along the batch."""
    experts = model.config.experts
    assert experts is not None
    width = len(model.config.stacks["layers"]) * experts.num_experts_per_tok
    return _rows(model, (*shape, width), experts.index_dtype)


def _like(arrays: Mapping[str, np.ndarray], model: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: _rows(model, array.shape, array.dtype) for name, array in arrays.items()}


def _placed(shapes: Any, binary: Binary, layout: Layout) -> Any:
    leaves, structure = jax.tree.flatten(shapes)
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(layout.mesh, spec))
        for leaf, spec in zip(leaves, binary.specs, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def bytes_on_device(tree: Any) -> int:
    """Of abstract arrays, as they are split."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# --- What a model computes -----------------------------------------------------------------------


def forward_flops(
    config: ModelConfig, rows: int, time: int, start: int = 0, *, with_module: bool = False
) -> float:
    """Products of a forward pass, two FLOPs each: weights, and causal attention.

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


def _used(spec: ParamSpec, config: ModelConfig) -> float:
    """The part of a weight that a token is multiplied by: of the routed experts, the chosen."""
    if not spec.per_expert or config.experts is None:
        return 1.0
    return config.experts.num_experts_per_tok / config.experts.n_routed_experts
