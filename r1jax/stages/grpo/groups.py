"""Groups of samples with their rewards, phases of them, and both as JSON for checkpoints and other
processes."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from r1jax.data.prompts import Prompt
from r1jax.files import JsonObject, encode_line
from r1jax.processes import BatchSlice, gather
from r1jax.rollouts.sampling import Completion
from r1jax.rollouts.scoring import PendingRewards
from r1jax.sampler import Finish, StopSearch
from r1jax.sampler.queue import QueueFigures, QueueSample
from r1jax.sharding import Layout
from r1jax.stages.grpo.selection import Choice, Fate, shares


class Question(NamedTuple):
    """A prompt of a dataset: the dataset's name, and the prompt's index in it."""

    data: str
    prompt: int


class StepRewards(NamedTuple):
    """Rewards of the steps of a sample.

    ends: int32 [steps], the completion's token that ends each, increasing. rewards: float32.
    """

    ends: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True)
class Group:
    """The samples of one question.

    rewards: float32 [samples]; nan where a sample was not scored.
    steps: of each sample, where a reward is `per_step`; these are not in `rewards`.
    """

    question: Question
    completions: Sequence[Completion]
    rewards: np.ndarray
    steps: Sequence[StepRewards] = ()


@dataclass(frozen=True)
class SampledQuestions:
    """Questions of all processes, and this one's completions, whose rewards are computed; all
    attempts of each sample.

    holders: the slice of the batch that has each question's samples.
    """

    questions: Sequence[Question]
    holders: Sequence[int]
    completions: Sequence[Completion]
    pending: Sequence[tuple[Sequence[int], PendingRewards]]


@dataclass
class Phase:
    """What a phase has sampled.

    step: at which it begins. choice: of the groups to train on. groups: by number, those of them
    that this process has. holders: by number, the slice of the batch that has a group; None: all.
    facts: of all samples, see `sample_facts`. rows: of samples.jsonl, of this process's first
    group. occurrences: of questions. passed: questions that were skipped. sampled, skipped:
    questions. dropped: questions whose samples nothing uses. continued: samples of phases before.
    unfinished: that the next phase goes on with. tokens: that this process has sampled.
    unscored: whose rewards are still computed.
    trained: this process's groups to train on; None: not all rewards are there.
    """

    step: int
    choice: Choice
    groups: dict[int, Group] = field(default_factory=dict)
    holders: list[int | None] = field(default_factory=list)
    facts: list[JsonObject] = field(default_factory=list)
    rows: list[JsonObject] = field(default_factory=list)
    occurrences: Counter[Question] = field(default_factory=Counter)
    passed: set[Question] = field(default_factory=set)
    sampled: int = 0
    skipped: int = 0
    dropped: int = 0
    continued: int = 0
    unfinished: int = 0
    tokens: int = 0
    rollout_seconds: float = 0.0
    score_seconds: float = 0.0
    figures: QueueFigures = field(default_factory=QueueFigures)
    unscored: list[SampledQuestions] = field(default_factory=list)
    trained: list[Group] | None = None


def is_unfinished(completion: Completion, limit: int) -> bool:
    """Whether a completion that was sampled in parts goes on, up to `limit` tokens."""
    return completion.finish == Finish.LENGTH and len(completion.token_ids) < limit


def joined(first: Completion, rest: QueueSample, stop: StopSearch | None) -> Completion:
    """A completion and what was sampled behind it, with the log-probs of both; without its text.

    Args:
      rest: of the prompt with `first` behind it.
      stop: finds stop strings, which may begin in the one and end in the other.
    """
    tokens = np.concatenate([first.token_ids, rest.tokens])
    log_probs = np.concatenate([first.sampler_log_probs, rest.sampling_log_probs])
    finish, experts = rest.finish, None
    if first.experts is not None and rest.experts is not None:
        experts = np.concatenate([first.experts, rest.experts[len(first.experts) :]])
    if stop is not None:
        (end,) = stop(tokens[None], np.asarray([len(tokens)]))
        if end >= 0:
            cut = len(first.prompt.token_ids) + end
            tokens, log_probs, finish = tokens[:end], log_probs[:end], Finish.STOP
            experts = None if experts is None else experts[:cut]
    return Completion(
        first.prompt, first.sample, tokens, log_probs, finish, text="", experts=experts
    )


def encode_group(group: Group) -> JsonObject:
    """All that an update reads, exactly."""
    return {
        "data": group.question.data,
        "prompt": group.question.prompt,
        "rewards": _encode_array(group.rewards),
        "completions": encode_completions(group.completions),
        **({"steps": [[*map(_encode_array, each)] for each in group.steps]} if group.steps else {}),
    }


def decode_group(encoded: JsonObject, prompt_of: Callable[[Question], Prompt]) -> Group:
    """The group that was encoded, without texts."""
    question = Question(encoded["data"], encoded["prompt"])
    completions = decode_completions(encoded["completions"], prompt_of(question))
    steps = [StepRewards(*map(_decode_array, each)) for each in encoded.get("steps", ())]
    return Group(question, completions, _decode_array(encoded["rewards"]), steps)


def encode_phase(phase: Phase, layout: Layout) -> JsonObject:
    """A phase that is sampled and scored, and not yet trained on; all processes call it.

    Figures that are only shown are left out.
    """
    assert phase.trained is not None
    return {
        "step": phase.step,
        "from_surplus": phase.choice.from_surplus,
        "fates": [str(fate) for fate in phase.choice.fates],
        "kept": phase.choice.kept,
        "facts": phase.facts,
        "rows": [json.loads(encode_line(row)) for row in phase.rows],
        "sampled": phase.sampled,
        "skipped": phase.skipped,
        "continued": phase.continued,
        "unfinished": phase.unfinished,
        "tokens": phase.tokens,
        "rollout_seconds": phase.rollout_seconds,
        "trained": gather([encode_group(group) for group in phase.trained], layout),
    }


def decode_phase(
    encoded: JsonObject, share: BatchSlice, prompt_of: Callable[[Question], Prompt]
) -> Phase:
    """The phase that was encoded, for a process of as many as there are now."""
    choice = Choice(encoded["from_surplus"], [Fate(fate) for fate in encoded["fates"]])
    choice.kept = list(encoded["kept"])
    of_process = shares(encoded["trained"], share.count)[share.index]
    plain = ("step", "facts", "rows", "sampled", "skipped", "continued", "unfinished", "tokens")
    return Phase(
        choice=choice,
        trained=[decode_group(group, prompt_of) for group in of_process],
        rollout_seconds=encoded["rollout_seconds"],
        **{name: encoded[name] for name in plain},
    )


def encode_completions(completions: Sequence[Completion]) -> JsonObject:
    """Completions of one prompt; not their texts, which follow from the tokens."""
    experts = [each.experts for each in completions if each.experts is not None]
    ends = np.cumsum([len(each.token_ids) for each in completions])
    return {
        "samples": [each.sample for each in completions],
        "finish": [int(each.finish) for each in completions],
        "drafted": [each.drafted for each in completions],
        "accepted": [each.accepted for each in completions],
        "ends": ends.tolist(),
        "token_ids": _encode_array(np.concatenate([each.token_ids for each in completions])),
        "sampler_log_probs": _encode_array(
            np.concatenate([each.sampler_log_probs for each in completions])
        ),
        **({"experts": _encode_array(np.concatenate(experts))} if experts else {}),
    }


def decode_completions(encoded: JsonObject, prompt: Prompt) -> list[Completion]:
    """The completions that were encoded, with empty texts."""
    cuts = encoded["ends"][:-1]
    count = len(encoded["ends"])
    experts: Sequence[np.ndarray | None] = [None] * count
    if "experts" in encoded:
        before = len(prompt.token_ids) * np.arange(1, count)
        experts = np.split(_decode_array(encoded["experts"]), before + np.asarray(cuts, int))
    return [
        Completion(prompt, sample, tokens, log_probs, Finish(finish), "", drafted, accepted, chosen)
        for sample, tokens, log_probs, finish, drafted, accepted, chosen in zip(
            encoded["samples"],
            np.split(_decode_array(encoded["token_ids"]), cuts),
            np.split(_decode_array(encoded["sampler_log_probs"]), cuts),
            encoded["finish"],
            encoded["drafted"],
            encoded["accepted"],
            experts,
            strict=True,
        )
    ]


def _encode_array(array: np.ndarray) -> JsonObject:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    text = base64.b64encode(little.tobytes()).decode()
    return {"dtype": little.dtype.str, "shape": list(array.shape), "data": text}


def _decode_array(encoded: JsonObject) -> np.ndarray:
    data = base64.b64decode(encoded["data"])
    return np.frombuffer(data, np.dtype(encoded["dtype"])).reshape(encoded["shape"])
