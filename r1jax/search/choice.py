"""Which solution of a tree is given as the search's, and what solutions it has, the best first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from r1jax.search.beam import beam_order
from r1jax.search.tree import SearchTree
from r1jax.settings.search import Choice

AnswerOf = Callable[[SearchTree, int], str | None]
"""The answer of a whole solution, equal for equal ones; None: it has none."""


def best_solution(tree: SearchTree, choose: Choice, answer_of: AnswerOf) -> int:
    """The node of the solution that is given as the search's.

    `value`: with the highest value. `votes`: the best of the answer whose solutions have the
    greatest sum of values; an answer without any value counts the samples. `visits`: at each step
    the child that the most paths led through, then the one with the higher value. Where there is no
    whole solution, or no vote, the next of these rules decides; without any solution, the beginning
    with the highest value is given, which is no answer.
    """
    if choose == "visits" and (node := _most_visited(tree)) is not None:
        return node
    solutions = ranked_solutions(tree)
    if choose == "votes" and (node := _most_voted(tree, solutions, answer_of)) is not None:
        return node
    if solutions:
        return solutions[0]
    return min(range(1, len(tree.nodes)), key=partial(beam_order, tree), default=0)


def ranked_solutions(tree: SearchTree) -> list[int]:
    """All whole solutions, the highest values first."""
    return sorted(tree.complete(), key=partial(beam_order, tree))


def agreement(tree: SearchTree, node: int, answer_of: AnswerOf) -> float:
    """The share of the tree's whole solutions, by samples, that have the answer of this one.

    Without an answer it is 0.
    """
    answer = answer_of(tree, node)
    if answer is None:
        return 0.0
    counts = [
        (answer_of(tree, each) == answer, tree.nodes[each].samples) for each in tree.complete()
    ]
    return sum(n for same, n in counts if same) / sum(n for _, n in counts)


def _most_visited(tree: SearchTree) -> int | None:
    node = 0
    while children := tree.nodes[node].children:
        node = max(
            children,
            key=lambda child: (tree.nodes[child].visits, tree.nodes[child].mean_value or 0, -child),
        )
        if not tree.nodes[node].visits:
            return None
    return node if tree.nodes[node].state == "complete" else None


def _most_voted(tree: SearchTree, solutions: list[int], answer_of: AnswerOf) -> int | None:
    votes: dict[str, float] = {}
    best: dict[str, int] = {}
    for node in solutions:
        if (answer := answer_of(tree, node)) is not None:
            value, samples = tree.nodes[node].value, tree.nodes[node].samples
            votes[answer] = votes.get(answer, 0.0) + samples * (1.0 if value is None else value)
            best.setdefault(answer, node)
    # The first of equal ones is that with the highest value.
    return best[max(votes, key=lambda answer: votes[answer])] if votes else None
