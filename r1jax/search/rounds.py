"""The rounds of many searches: what all of them ask for is sampled, and scored, as one batch.

A search is a generator. It gives the beginnings that it would have continued, and goes on when
their next steps are in its tree; it ends when it is done. It decides by its tree alone, so that the
tree is the same whatever other searches there are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from r1jax.search.tree import SearchTree, Step


@dataclass(frozen=True)
class Expansion:
    """`count` next steps of the beginning `node`; the first is sample number `first` of it."""

    node: int
    count: int
    first: int = 0


RunningSearch: TypeAlias = Generator[Sequence[Expansion], None, None]
SearchRounds: TypeAlias = Generator[
    list[tuple[SearchTree, Expansion]], Sequence[Sequence[Step]], None
]
"""Gives the expansions of a round, and is sent the steps of each, `count` of them."""
ScoreNodes = Callable[[Sequence[tuple[SearchTree, int]]], Sequence[float | None]]
"""The value of each node, in 0..1, or None."""


def search_rounds(
    searches: Sequence[tuple[SearchTree, RunningSearch]],
    score: ScoreNodes,
    any_process: Callable[[bool], bool] = bool,
) -> SearchRounds:
    """Take all searches to their ends, in rounds.

    Args:
      any_process: whether a flag is set in any process: all of them take as many rounds, in some of
        which a process may have nothing to expand.
    """
    waiting = [(tree, search, next(search, None)) for tree, search in searches]
    while True:
        going = [(tree, search, wanted) for tree, search, wanted in waiting if wanted is not None]
        if not any_process(bool(going)):
            return
        pairs = [(tree, expansion) for tree, _, wanted in going for expansion in wanted]
        made = yield pairs
        new = [
            (tree, node)
            for (tree, expansion), steps in zip(pairs, made, strict=True)
            for node in tree.add(expansion.node, steps)
        ]
        for (tree, node), value in zip(new, score(new), strict=True):
            tree.nodes[node].value = value
        waiting = [(tree, search, next(search, None)) for tree, search, _ in going]


def affordable(
    wanted: Sequence[Expansion], tree: SearchTree, budget_tokens: int
) -> list[Expansion]:
    """The first expansions whose steps the rest of the budget suffices for, at their longest.

    So no search ever generates more than its budget.
    """
    left, chosen = budget_tokens - tree.generated, list[Expansion]()
    for expansion in wanted:
        left -= expansion.count * tree.step_tokens
        if left < 0:
            break
        chosen.append(expansion)
    return chosen
