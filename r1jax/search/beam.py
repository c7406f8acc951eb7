"""Step-level beam search (Xie et al. 2023, arXiv 2305.00633; Snell et al. 2024, arXiv 2408.03314).

The first steps are `width` x `expansions` samples; then each beam gets `expansions` next steps, and
of all of them and of the beams that have ended the `width` with the highest values go on.
"""

from __future__ import annotations

from functools import partial

from r1jax.search.rounds import Expansion, RunningSearch, affordable
from r1jax.search.tree import SearchTree
from r1jax.settings.search import BeamSearch


def beam_search(tree: SearchTree, settings: BeamSearch) -> RunningSearch:
    """Search until all beams have ended, or the budget suffices for no further step.

    Where it does not suffice for all beams, the best go on.
    """
    beams, first = [0], settings.width
    while True:
        wanted = [
            Expansion(node, settings.expansions, number * settings.expansions)
            for node in beams
            if tree.nodes[node].state == "open"
            for number in range(first)
        ]
        chosen = affordable(wanted, tree, settings.budget_tokens)
        if not chosen:
            return
        yield chosen
        first, expanded = 1, {expansion.node for expansion in chosen}
        candidates = [child for node in expanded for child in tree.nodes[node].children]
        candidates += [node for node in beams if node not in expanded]
        beams = sorted(candidates, key=partial(beam_order, tree))[: settings.width]


def beam_order(tree: SearchTree, node: int) -> tuple[float, float, int]:
    """What beams are sorted by: value, then log-prob, then which was made first."""
    value = tree.nodes[node].value
    return -(0.0 if value is None else value), -tree.log_prob(node), node
