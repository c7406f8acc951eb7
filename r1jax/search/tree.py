"""The tree of a search: beginnings of solutions of one problem, a step for each edge."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from r1jax.files import JsonObject

StepEnd = Literal["step", "eos", "stop", "length"]
"""What ended a sampled step: the step rule, EOS, a stop string, or `max_step_tokens`."""
State = Literal["open", "complete", "truncated"]
"""Of a beginning: it may go on, it is a whole solution, or it has no room for a further step."""

_SAMPLE_NUMBERS = 0x7FFF0000  # what a node's samples add to one stays an int32


@dataclass(frozen=True)
class Step:
    """A sampled step.

    token_ids: EOS included. text: without it. log_prob: of all its tokens together, in nats, under
    the distribution that they were drawn from.
    """

    token_ids: tuple[int, ...]
    text: str
    log_prob: float
    end: StepEnd


_QUESTION = Step((), "", 0.0, "step")


@dataclass
class Node:
    """The beginning of a solution that ends with `step`.

    rank: among the children of its parent. samples: that came out as this step. tokens: of the
    beginning. value: its score in 0..1, where it has one. visits, value_sum: of the paths that
    led through it, and of the values that they came to. under_way: paths that have not come back.
    """

    parent: int
    rank: int
    step: Step
    tokens: int
    state: State
    samples: int = 1
    value: float | None = None
    visits: int = 0
    value_sum: float = 0.0
    under_way: int = 0
    children: list[int] = field(default_factory=list)

    @property
    def mean_value(self) -> float | None:
        """The mean of the values that paths through it came to; before any, its score."""
        return self.value_sum / self.visits if self.visits else self.value


@dataclass
class SearchTree:
    """All beginnings that a search has made; node 0 is the question alone.

    problem, search: the problem's id, and which search of it this is. solution_tokens: of a
    solution at most. step_tokens: of a step at most. generated: tokens so far, of all branches and
    of equal steps that were sampled twice.
    """

    problem: int
    search: int
    solution_tokens: int
    step_tokens: int
    generated: int = 0
    nodes: list[Node] = field(default_factory=lambda: [Node(-1, 0, _QUESTION, 0, "open")])

    def add(self, parent: int, steps: Sequence[Step]) -> list[int]:
        """Put sampled steps behind a node, equal ones as one; gives the nodes that are new."""
        above = self.nodes[parent]
        known = {self.nodes[child].step.token_ids: child for child in above.children}
        new = []
        for step in steps:
            self.generated += len(step.token_ids)
            if (same := known.get(step.token_ids)) is not None:
                self.nodes[same].samples += 1
                continue
            tokens = above.tokens + len(step.token_ids)
            state: State = "open"
            if step.end in ("eos", "stop"):
                state = "complete"
            elif tokens + self.step_tokens > self.solution_tokens:
                state = "truncated"
            index = known[step.token_ids] = len(self.nodes)
            self.nodes.append(Node(parent, len(above.children), step, tokens, state))
            above.children.append(index)
            new.append(index)
        return new

    def path(self, node: int) -> list[int]:
        """The nodes from the first step to this one."""
        path = []
        while node > 0:
            path.append(node)
            node = self.nodes[node].parent
        return path[::-1]

    def token_ids(self, node: int) -> list[int]:
        """The tokens of the beginning that a node stands for."""
        return [token for each in self.path(node) for token in self.nodes[each].step.token_ids]

    def log_prob(self, node: int) -> float:
        """Of the beginning that a node stands for."""
        return math.fsum(self.nodes[each].step.log_prob for each in self.path(node))

    def first_sample(self, node: int) -> int:
        """The number of the first step that is sampled behind a node, for its random numbers.

        With seed and problem it decides them: a function of the search and of the ranks on the path
        alone, whatever else the tree holds.
        """
        ranks = [self.nodes[each].rank for each in self.path(node)]
        return zlib.crc32(repr((self.search, ranks)).encode()) % _SAMPLE_NUMBERS

    def complete(self) -> list[int]:
        """The nodes that are whole solutions, in the order in which they were made."""
        return [i for i, node in enumerate(self.nodes) if node.state == "complete"]

    def priors(self, node: int) -> list[float]:
        """Of each child the probability of its step, normalised over the children."""
        log_probs = [self.nodes[child].step.log_prob for child in self.nodes[node].children]
        best = max(log_probs, default=0.0)
        weights = [math.exp(log_prob - best) for log_prob in log_probs]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def rows(self) -> list[JsonObject]:
        """The nodes as JSON, the question first."""
        priors = {0: 1.0}
        for index, node in enumerate(self.nodes):
            priors |= dict(zip(node.children, self.priors(index), strict=True))
        return [
            {
                "parent": node.parent if index else None,
                "text": node.step.text,
                "tokens": len(node.step.token_ids),
                "log_prob": node.step.log_prob,
                "prior": round(priors[index], 6),
                "samples": node.samples,
                "value": node.value,
                "visits": node.visits,
                "mean_value": None if node.mean_value is None else round(node.mean_value, 6),
                "state": node.state,
            }
            for index, node in enumerate(self.nodes)
        ]


def path_of(nodes: Sequence[JsonObject], node: int) -> list[int]:
    """As `SearchTree.path`, of the stored rows of a tree."""
    path: list[int] = []
    while node > 0:
        path.append(node)
        node = nodes[node]["parent"]
    return path[::-1]
