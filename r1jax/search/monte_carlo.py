"""Monte Carlo tree search over steps (Feng et al. 2024, arXiv 2309.17179; AlphaZero, 1712.01815).

Each simulation is a path from the question to the end of a solution: where the path comes to a
beginning without next steps, these are sampled, and it goes on. Then the value of the solution is
added to all nodes of the path, whose means decide the next paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from r1jax.search.rounds import Expansion, RunningSearch, affordable
from r1jax.search.tree import SearchTree
from r1jax.settings.search import TreeSearch

ValueOf = Callable[[SearchTree, int], float]
"""The value of a whole solution, in 0..1. It does not know the reference answer."""


def monte_carlo_search(tree: SearchTree, settings: TreeSearch, value_of: ValueOf) -> RunningSearch:
    """Search until all simulations are done, or the budget suffices for no further step."""
    paths = [[0] for _ in range(min(settings.paths_at_once, settings.simulations))]
    left = settings.simulations - len(paths)
    while paths:
        waiting: list[list[int]] = []
        for path in paths:
            current: list[int] | None = path
            while current is not None and not _descend(tree, current, settings.exploration):
                _back_up(tree, current, value_of)
                current, left = ([0], left - 1) if left else (None, 0)
            if current is not None:
                waiting.append(current)
        leaves = dict.fromkeys(path[-1] for path in waiting)
        wanted = [Expansion(node, settings.expansions) for node in leaves]
        chosen = affordable(wanted, tree, settings.budget_tokens)
        funded = {expansion.node for expansion in chosen}
        paths = [path for path in waiting if path[-1] in funded]
        for path in waiting:
            if path[-1] not in funded:  # it leads nowhere any more
                for node in path:
                    tree.nodes[node].under_way -= node > 0
        if chosen:
            yield chosen


def _descend(tree: SearchTree, path: list[int], exploration: float) -> bool:
    """Go on to a node without next steps; False where it has ended.

    Each node of the way counts as lost until the path has come back: a virtual loss, which lets
    other paths of the round go elsewhere.
    """
    while tree.nodes[path[-1]].children:
        scores = puct_scores(tree, path[-1], exploration)
        best = max(range(len(scores)), key=lambda rank: (scores[rank], -rank))
        path.append(tree.nodes[path[-1]].children[best])
        tree.nodes[path[-1]].under_way += 1
    return tree.nodes[path[-1]].state == "open"


def _back_up(tree: SearchTree, path: list[int], value_of: ValueOf) -> None:
    """Add the value of the solution at the end of a path to all nodes of it.

    One that was cut off has no answer, and the value 0.
    """
    value = value_of(tree, path[-1]) if tree.nodes[path[-1]].state == "complete" else 0.0
    for each in path:
        node = tree.nodes[each]
        node.under_way -= each > 0
        node.visits += 1
        node.value_sum += value


def puct_scores(tree: SearchTree, node: int, exploration: float) -> list[float]:
    """Of each child a: Q(a) + c P(a) sqrt(sum of N) / (1 + N(a)) (AlphaZero, page 17).

    N counts visits and paths that are under way, which add a value of 0. Q is the mean value; of a
    child without visits its score, or without a score the mean value of the parent.
    """
    children = [tree.nodes[child] for child in tree.nodes[node].children]
    visits = [child.visits + child.under_way for child in children]
    parent = tree.nodes[node].mean_value or 0.0
    root = math.sqrt(sum(visits))
    scores = []
    for child, count, prior in zip(children, visits, tree.priors(node), strict=True):
        unvisited = parent if child.value is None else child.value
        mean = child.value_sum / count if count else unvisited
        scores.append(mean + exploration * prior * root / (1 + count))
    return scores
