"""What sampling and scoring compile: prefill, decoding, growth of the KV cache, reward models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np

from r1jax.data.padded_rows import pad_texts
from r1jax.models import Decoder
from r1jax.models.parameters import abstract_weights
from r1jax.programs.lengths import CutLognormal
from r1jax.programs.program import (
    Planning,
    Program,
    StagePrograms,
    batch_arrays_like,
    forward_flops,
    longest_prompt,
)
from r1jax.programs.slots import SlotRollout
from r1jax.rollouts.scoring import make_score, row_tokens, rows_at_once
from r1jax.rollouts.searching import search_slots
from r1jax.settings.sampling import DatasetSampling, LengthsSection
from r1jax.settings.search import DatasetSearch, critic_of_search
from r1jax.settings.stage import Stage
from r1jax.settings.turns import Turn, attempt_limits, tokens_of_turns

if TYPE_CHECKING:
    from r1jax.programs.program import AbstractTree


# A reward's model, and whether its output becomes the probability of a safe response.
RewardModel = tuple[Decoder, bool]


def reward_models(stage: Stage, planning: Planning) -> dict[str, RewardModel]:
    """Reward -> its model, of the stage's rewards that have one."""
    formats = {each.name: each.reward_model_format() for each in planning.config.stages}
    models: dict[str, RewardModel] = {}
    for name, reward in planning.config.rewards_of(stage).items():
        if reward.model is not None:
            trained = formats.get(reward.model)
            labelled = trained is not None and trained.labelled
            models[name] = planning.decoder_of(reward.model), labelled
    return models


def reward_model_weights(models: Mapping[str, RewardModel]) -> dict[str, AbstractTree]:
    """What they keep in memory, for `Program.resident`."""
    return {"reward models": [abstract_weights(decoder) for decoder, _ in models.values()]}


def reward_programs(
    models: Mapping[str, RewardModel],
    tokens: int,
    samples: int,
    resident: Mapping[str, AbstractTree],
) -> Iterator[Program]:
    """Scores of that many samples of that many tokens, each of which every model reads."""
    for name, (model, as_probability) in models.items():
        rows = rows_at_once(model.layout)
        texts = [np.zeros(1, np.int32)] * rows
        inputs = batch_arrays_like(pad_texts(texts, row_tokens(tokens)), model)
        weights = abstract_weights(model)
        score = jax.jit(make_score(model, as_probability))
        others = {key: other for key, other in models.items() if key != name}
        yield Program(
            f"reward {name}",
            model.layout.mesh.shape,
            partial(score.lower, weights, inputs),
            {"reward models": weights, "batch": inputs},
            {**resident, **reward_model_weights(others)},
            calls=samples / rows,
            useful_flops=forward_flops(model.config, rows, tokens),
        )


def sampling_programs(stage: Stage, planning: Planning, wanted: DatasetSampling) -> StagePrograms:
    """The programs of a stage that samples and scores; a step is a batch of prompts."""
    model, prompt = planning.sampler_of(stage.name), longest_prompt(stage, planning.config)
    prompts, samples, new_tokens = wanted.batch, wanted.samples_at_once, wanted.max_new_tokens
    lengths = planned_lengths(wanted.lengths, new_tokens)
    # Of all prompts, as far as their number is known.
    queue = None
    if wanted.limit is not None:
        queue = max(prompts, wanted.limit * wanted.samples // samples)
    rollout = SlotRollout(
        model, prompts, samples, prompt, new_tokens, wanted.sampling, lengths, queue
    )
    calls = prompts / rollout.prompts
    attempts, longest = 1, new_tokens
    later: list[tuple[str, SlotRollout]] = []
    if wanted.turns:
        first, *_ = attempt_limits(wanted.turns, new_tokens)
        rollout = replace(rollout, new_tokens=first, lengths=planned_lengths(wanted.lengths, first))
        later = list(later_attempts(rollout, wanted.turns, new_tokens))
        attempts, longest = 1 + len(later), tokens_of_turns(wanted.turns, new_tokens)
    scorers = reward_models(stage, planning)
    resident = reward_model_weights(scorers)
    scoring = {**resident, "weights": abstract_weights(model)}
    programs = [
        *rollout.programs(resident, calls),
        *(program for name, each in later for program in each.programs(resident, calls, name)),
        *reward_programs(scorers, prompt + longest, prompts * samples * attempts, scoring),
    ]
    means = [rollout.lengths.mean, *(each.lengths.mean for _, each in later)]
    tokens = round(prompts * samples * sum(means))
    return StagePrograms(tuple(programs), tokens, "batch", tuple(rollout.notes()))


def search_programs(stage: Stage, planning: Planning, wanted: DatasetSearch) -> StagePrograms:
    """The programs of a stage that searches; a step is a round of a batch, in which every search
    continues as many beginnings as it may, each as long as may be.

    Those that are read whole are padded to powers of two, of which each compiles once; the plan has
    the largest. The others go on from what is in the KV cache, which stays while they are scored.
    """
    model, search = planning.sampler_of(stage.name), wanted.search
    longest = longest_prompt(stage, planning.config) + wanted.max_new_tokens
    beginnings = wanted.batch * search.prefixes
    rollout = SlotRollout(
        model,
        beginnings,
        search.expansions,
        longest - search.max_step_tokens,
        search.max_step_tokens,
        wanted.sampling.model_copy(update={"slots": search_slots(wanted, model)}),
        CutLognormal.equal(search.max_step_tokens),
        fixed_shape=True,
        extended_by=search.max_step_tokens,
    )
    scorers = reward_models(stage, planning)
    if (source := critic_of_search(search)) is not None:
        critic = planning.decoder_of(source)
        config = replace(critic.config, head="scalar", num_nextn_predict_layers=0)
        scorers[f"critic of {source}"] = replace(critic, config=config), False
    resident = reward_model_weights(scorers)
    scoring = {
        **resident,
        "weights": abstract_weights(model),
        "cache": rollout.state.cache,
        "slots": vars(rollout.state) | {"cache": None},
    }
    steps = beginnings * search.expansions
    programs = [
        *rollout.programs(resident, 1.0, "steps: "),
        *reward_programs(scorers, longest, steps, scoring),
    ]
    tokens = steps * search.max_step_tokens
    return StagePrograms(tuple(programs), tokens, "round", tuple(rollout.notes()))


def later_attempts(
    first: SlotRollout, turns: Sequence[Turn], max_new_tokens: int
) -> Iterator[tuple[str, SlotRollout]]:
    """The queues of the attempts behind the first one, each with a prefix for its programs.

    Every prompt has one sample, and is as long as all that stands before it may be.
    """
    before = first.prompt_tokens
    limits = iter(attempt_limits(turns, max_new_tokens))
    limit = 0
    for number, turn in enumerate(turns):
        if turn.role == "user":
            before += turn.context_tokens
            continue
        before, limit = before + limit, next(limits)
        if number:
            queue = None if first.queue is None else first.queue * first.samples
            yield (
                f"attempt {number // 2 + 1}: ",
                replace(
                    first,
                    at_once=first.at_once * first.samples,
                    samples=1,
                    prompt_tokens=before,
                    new_tokens=limit,
                    lengths=planned_lengths(None, limit),
                    queue=queue,
                ),
            )


def planned_lengths(given: LengthsSection | None, limit: int) -> CutLognormal:
    """Lengths of completions of at most `limit` tokens, as a plan counts them."""
    return (
        CutLognormal.equal(limit)
        if given is None
        else CutLognormal.of(given.mean, given.p99, limit)
    )
