"""The steps of a batch of searches, sampled through one queue.

The queue stays open from the first round to the last. A beginning is what an earlier one was, and a
step behind it: the queue has the pages of that one, and reads the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from r1jax.data.padded_rows import bucket
from r1jax.data.prompts import Prompt
from r1jax.metrics.heartbeat import span
from r1jax.models.parameters import Params
from r1jax.processes import gather, max_over_processes, process_batch_slice
from r1jax.rollouts.sampling import completion_texts
from r1jax.run.models import LanguageModel
from r1jax.sampler import GenerateOptions
from r1jax.sampler.queue import PromptFeed, QueuedPrompt, QueueFigures, QueueSample, sample_queue
from r1jax.search.rounds import Expansion, SearchRounds
from r1jax.search.tree import SearchTree, Step


@dataclass
class SearchQueue:
    """Samples what the searches of this process ask for; every process makes the same calls.

    prompts: by their ids. rounds: not begun. solution_tokens: of a beginning that is continued at
    most. step_of: a sample, and its text, as a step.
    figures: is added to.
    """

    params: Params
    sampler: LanguageModel
    options: GenerateOptions
    prompts: Mapping[int, Prompt]
    rounds: SearchRounds
    solution_tokens: int
    step_of: Callable[[QueueSample, str], Step]
    figures: QueueFigures
    _queue: list[QueuedPrompt] = field(default_factory=list)
    # Index in the queue of the first prompt that is this beginning; a question's for all searches.
    _beginnings: dict[tuple[int, ...], int] = field(default_factory=dict)
    _asked: list[int] | None = None  # what was asked for in this round, as indices in the queue
    _found: dict[tuple[int, int], QueueSample] = field(default_factory=dict)

    def run(self) -> None:
        """Take the searches to their ends."""
        layout = self.sampler.decoder.layout
        longest = max((len(prompt.token_ids) for prompt in self.prompts.values()), default=1)
        longest = max_over_processes(longest, layout) + self.solution_tokens
        samples = sample_queue(
            self.params,
            PromptFeed(self._following, at_once=1),
            self.sampler.decoder,
            self.options,
            prompt_tokens=bucket(longest),
            figures=self.figures,
        )
        while True:
            with span("rollout"):
                ended = next(samples, None)
            if ended is None:
                return
            self._found |= {(each.prompt, each.sample): each for each in ended}

    def _following(self, idle: bool) -> list[list[QueuedPrompt]] | None:
        """The beginnings of the next round, of each slice; None: the searches have ended."""
        share = process_batch_slice(self.sampler.decoder.layout)
        if not idle:
            return [[] for _ in range(share.count)]
        pairs = self._next_round()
        if pairs is None:
            return None
        new = self._queued(pairs)
        known = [
            [len(each.token_ids), -1 if each.extends is None else each.extends] for each in new
        ]
        of_slices = [
            [_of_length(*each) for each in of_slice]
            for of_slice in gather([known], self.sampler.decoder.layout)
        ]
        of_slices[share.index] = new
        return of_slices

    def _next_round(self) -> Sequence[tuple[SearchTree, Expansion]] | None:
        try:
            if self._asked is None:
                return next(self.rounds)
            return self.rounds.send(self._steps(self._asked))
        except StopIteration:
            return None

    def _steps(self, asked: Sequence[int]) -> list[list[Step]]:
        """Of each expansion of the round."""
        count = self.options.samples
        samples = [self._found.pop((index, sample)) for index in asked for sample in range(count)]
        texts = completion_texts(self.sampler, [(each.tokens, each.finish) for each in samples])
        steps = [self.step_of(*each) for each in zip(samples, texts, strict=True)]
        return [steps[i : i + count] for i in range(0, len(steps), count)]

    def _queued(self, pairs: Sequence[tuple[SearchTree, Expansion]]) -> list[QueuedPrompt]:
        """The prompts of expansions: first those of new beginnings, then further ones of the same,
        which have all pages of these but the last."""
        keys = [_key(tree, expansion.node) for tree, expansion in pairs]
        firsts = {key: index for index, key in reversed(list(enumerate(keys)))}
        new = {index for key, index in firsts.items() if key not in self._beginnings}
        order = sorted(range(len(pairs)), key=lambda index: index not in new)
        self._asked = [0] * len(pairs)
        begin = len(self._queue)
        for index in order:
            tree, expansion = pairs[index]
            prompt, node = self.prompts[tree.problem], expansion.node
            extends = self._beginnings.get(keys[index])
            if extends is None and node > 0:
                extends = self._beginnings[_key(tree, tree.nodes[node].parent)]
            self._asked[index] = len(self._queue)
            self._beginnings.setdefault(keys[index], len(self._queue))
            ids = np.asarray([*prompt.token_ids, *tree.token_ids(node)], np.int32)
            first = tree.first_sample(node) + expansion.first
            self._queue.append(QueuedPrompt(ids, prompt.id, first, extends))
        return self._queue[begin:]


def _key(tree: SearchTree, node: int) -> tuple[int, ...]:
    """Of a beginning; all searches of a problem begin with the same question."""
    return (tree.problem, tree.search, node) if node else (tree.problem,)


def _of_length(length: int, extends: int) -> QueuedPrompt:
    """A prompt of another process, of whose tokens the number counts alone."""
    return QueuedPrompt(np.zeros(length, np.int32), 0, extends=None if extends < 0 else extends)
