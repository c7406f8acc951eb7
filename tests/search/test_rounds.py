"""Searches against brute force on trees made by hand: no model, no JAX."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest

from r1jax.search.beam import beam_search
from r1jax.search.choice import agreement, best_solution, ranked_solutions
from r1jax.search.monte_carlo import monte_carlo_search, puct_scores
from r1jax.search.rounds import (
    Expansion,
    RunningSearch,
    ScoreNodes,
    affordable,
    search_rounds,
)
from r1jax.search.tree import SearchTree, Step
from r1jax.settings.search import BeamSearch, TreeSearch

DEPTH, LETTERS = 4, "abc"


def tree_of(problem: int = 0, search: int = 0, step_tokens: int = 1) -> SearchTree:
    return SearchTree(problem, search, DEPTH * step_tokens, step_tokens)


def text_of(tree: SearchTree, node: int) -> str:
    return "".join(tree.nodes[each].step.text for each in tree.path(node))


def letter(text: str, log_prob: float = -1.0, *, last: bool = False, tokens: int = 1) -> Step:
    ids = (ord(text), *[0] * (tokens - 1))
    return Step(ids, text, log_prob, "eos" if last else "step")


def all_letters(pairs: Sequence[tuple[SearchTree, Expansion]]) -> list[list[Step]]:
    """Every letter in turn, so that 3 samples are all continuations; 4 letters are a solution."""
    made = []
    for tree, each in pairs:
        last = len(tree.path(each.node)) == DEPTH - 1
        numbers = range(each.first, each.first + each.count)
        made.append([letter(LETTERS[n % 3], last=last) for n in numbers])
    return made


def value(text: str) -> float:
    """Of a beginning: any number in 0..1, the same for the same text."""
    return zlib.crc32(text.encode()) / 2**32


def scored(of: Callable[[str], float]) -> Callable[..., list[float | None]]:
    return lambda pairs: [of(text_of(tree, node)) for tree, node in pairs]


def run_searches(
    searches: Sequence[tuple[SearchTree, RunningSearch]],
    expand: Callable[[Sequence[tuple[SearchTree, Expansion]]], list[list[Step]]],
    score: ScoreNodes,
) -> None:
    rounds = search_rounds(searches, score)
    wanted = next(rounds, None)
    while wanted is not None:
        steps = expand(wanted)
        try:
            wanted = rounds.send(steps)
        except StopIteration:
            return


def finish(tree: SearchTree, search: RunningSearch, of: Callable[[str], float] = value) -> None:
    run_searches([(tree, search)], all_letters, scored(of))


def beam(**changes: object) -> BeamSearch:
    fields = {"budget_tokens": 10_000, "expansions": 3, "max_step_tokens": 1, "width": 2}
    return BeamSearch.model_validate({**fields, "scored_by": "x", **changes})


def mcts(**changes: object) -> TreeSearch:
    fields = {"budget_tokens": 10_000, "expansions": 3, "max_step_tokens": 1}
    return TreeSearch.model_validate({**fields, **changes})


def node_value(tree: SearchTree, node: int) -> float:
    known = tree.nodes[node].value
    assert known is not None
    return known


@pytest.mark.parametrize("width", [1, 2, 5, 27])
def test_beam_search_is_that_of_brute_force(width: int) -> None:
    tree = tree_of()
    finish(tree, beam_search(tree, beam(width=width)))
    beams, solutions = [""], set[str]()
    for _ in range(DEPTH):
        longer = [each + x for each in beams for x in LETTERS]
        solutions |= {text for text in longer if len(text) == DEPTH}
        beams = sorted(longer, key=value, reverse=True)[:width]
    assert {text_of(tree, node) for node in tree.complete()} == solutions
    chosen = best_solution(tree, "value", lambda *_: None)
    assert text_of(tree, chosen) == max(solutions, key=value)
    if width == 27:
        assert len(solutions) == 3**DEPTH


def test_beams_that_have_ended_are_among_the_best() -> None:
    """With two beams one goes on beside the solution `a`; its best step is not as good."""
    asked: list[list[int]] = []

    def expand(pairs: Sequence[tuple[SearchTree, Expansion]]) -> list[list[Step]]:
        asked.append([each.node for _, each in pairs])
        made = []
        for tree, each in pairs:
            deep = len(tree.path(each.node))
            steps = [letter("a", last=deep != 1), letter("b"), letter("c")]
            made.append(steps[: each.count])
        return made

    values = {"a": 0.9, "b": 0.5, "c": 0.1, "ba": 0.4, "bb": 0.3, "bc": 0.2}
    tree = tree_of()
    search = beam_search(tree, beam(width=2))
    of = scored(lambda text: values.get(text, 0.0))
    run_searches([(tree, search)], expand, of)
    # The question twice for the first beams, then `b`, `ba` and `baa`.
    assert asked[0] == [0, 0]
    assert [[text_of(tree, node) for node in each] for each in asked[1:]] == [["b"], ["ba"]]
    assert text_of(tree, best_solution(tree, "value", lambda *_: None)) == "a"


def test_mcts_comes_to_the_best_of_all_solutions() -> None:
    """With values of whole solutions alone, and enough paths."""

    def only_whole(pairs: Sequence[tuple[SearchTree, int]]) -> list[float | None]:
        texts = [text_of(tree, node) for tree, node in pairs]
        return [value(text) if len(text) == DEPTH else None for text in texts]

    tree = tree_of()
    search = monte_carlo_search(tree, mcts(simulations=2000, exploration=2.0), node_value)
    run_searches([(tree, search)], all_letters, only_whole)
    best = max(map("".join, itertools.product(LETTERS, repeat=DEPTH)), key=value)
    for choose in ("value", "visits"):
        assert text_of(tree, best_solution(tree, choose, lambda *_: None)) == best
    assert tree.nodes[0].visits == 2000
    for node in tree.nodes:  # every path ends in a solution, and is counted on its way
        assert node.under_way == 0
        if node.children:
            assert node.visits == sum(tree.nodes[child].visits for child in node.children)
            total = math.fsum(tree.nodes[child].value_sum for child in node.children)
            assert node.value_sum == pytest.approx(total)


def test_puct_by_hand() -> None:
    """AlphaZero: Q + c P sqrt(sum N) / (1 + N), with P = e^l over their sum."""
    tree = tree_of()
    tree.add(
        0, [letter("a", math.log(0.3)), letter("b", math.log(0.1)), letter("c", math.log(0.2))]
    )
    a, b, c = (tree.nodes[i] for i in (1, 2, 3))
    assert tree.priors(0) == pytest.approx([1 / 2, 1 / 6, 1 / 3])
    a.value, b.value, c.value = 0.2, 0.9, None
    tree.nodes[0].visits, tree.nodes[0].value_sum = 4, 2.4
    a.visits, a.value_sum = 3, 1.5
    c.under_way = 1
    # a: 1.5 / 3; b: its score; c: one path under way, so far lost. Sum of N: 4.
    expected = [
        0.5 + 1.5 * (1 / 2) * 2 / 4,
        0.9 + 1.5 * (1 / 6) * 2 / 1,
        0.0 + 1.5 * (1 / 3) * 2 / 2,
    ]
    assert puct_scores(tree, 0, 1.5) == pytest.approx(expected)
    c.under_way = 0  # without a visit or a score: the mean of the parent
    assert puct_scores(tree, 0, 0.0) == pytest.approx([0.5, 0.9, 0.6])


def test_the_first_paths_by_hand() -> None:
    """Two paths at once go different ways, by the virtual loss, and come back with their values."""
    tree = SearchTree(0, 0, 2, 1)

    def expand(pairs: Sequence[tuple[SearchTree, Expansion]]) -> list[list[Step]]:
        asked.append([each.node for _, each in pairs])
        return [
            [letter("a", last=each.node > 0), letter("b", last=each.node > 0)] for _, each in pairs
        ]

    asked: list[list[int]] = []
    values = {"a": 0.6, "b": 0.5, "aa": 0.8, "ab": 0.1, "ba": 0.4, "bb": 0.3}
    settings = mcts(expansions=2, simulations=2, paths_at_once=2)
    search = monte_carlo_search(tree, settings, node_value)
    run_searches([(tree, search)], expand, scored(values.__getitem__))
    # Both begin at the question; the second finds `a` taken, and takes `b`.
    assert asked == [[0], [1, 2]]
    visits = {text_of(tree, i): node.visits for i, node in enumerate(tree.nodes)}
    assert visits == {"": 2, "a": 1, "b": 1, "aa": 1, "ab": 0, "ba": 1, "bb": 0}
    assert tree.nodes[0].mean_value == pytest.approx(0.6)


def random_steps(pairs: Sequence[tuple[SearchTree, Expansion]]) -> list[list[Step]]:
    """Steps of 1 to 5 tokens, by the number of the sample and by nothing else."""
    made = []
    for tree, each in pairs:
        first = tree.first_sample(each.node) + each.first
        steps = []
        for number in range(first, first + each.count):
            draw = random.Random(f"{tree.problem} {number}")
            last = len(tree.path(each.node)) > 1 and draw.random() < 0.4
            tokens = tuple(draw.randrange(3) for _ in range(1 + draw.randrange(5)))
            text = "".join(map(str, tokens))
            steps.append(Step(tokens, text, -draw.random(), "eos" if last else "step"))
        made.append(steps)
    return made


SEARCHES: list[Callable[[SearchTree, int], RunningSearch]] = [
    lambda tree, budget: beam_search(
        tree, beam(width=3, expansions=2, max_step_tokens=5, budget_tokens=budget)
    ),
    lambda tree, budget: monte_carlo_search(
        tree,
        mcts(expansions=2, max_step_tokens=5, budget_tokens=budget, paths_at_once=3),
        node_value,
    ),
]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("budget", [10, 11, 23, 64, 200, 1000])
def test_a_budget_is_never_exceeded_and_counted_exactly(
    search: Callable[[SearchTree, int], RunningSearch], budget: int
) -> None:
    for problem in range(20):
        tree, sampled = SearchTree(problem, 0, 60, 5), 0

        def expand(pairs: Sequence[tuple[SearchTree, Expansion]]) -> list[list[Step]]:
            nonlocal sampled
            made = random_steps(pairs)
            sampled += sum(len(step.token_ids) for steps in made for step in steps)
            return made

        run_searches([(tree, search(tree, budget))], expand, scored(value))
        assert 0 < tree.generated == sampled <= budget
        assert all(node.tokens <= 60 and node.under_way == 0 for node in tree.nodes)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_tree_depends_on_its_problem_and_number_alone(
    search: Callable[[SearchTree, int], RunningSearch],
) -> None:
    keys = [(problem, number) for problem in range(6) for number in range(2)]

    def rows(batches: Sequence[Sequence[tuple[int, int]]]) -> dict[tuple[int, int], object]:
        found = {}
        for batch in batches:
            trees = [SearchTree(problem, number, 60, 5) for problem, number in batch]
            pairs = [(tree, search(tree, 150)) for tree in trees]
            run_searches(pairs, random_steps, scored(value))
            found |= {(tree.problem, tree.search): tree.rows() for tree in trees}
        return found

    alone = rows([[key] for key in keys])
    assert rows([keys]) == rows([keys[::-1]]) == rows([keys[:5], keys[5:]]) == alone
    assert len({str(tree) for tree in alone.values()}) == len(keys)


def test_random_numbers_are_of_the_path() -> None:
    """Not of when a node was made."""
    one, other = tree_of(), tree_of()
    one.add(0, [letter("a"), letter("b")])
    one.add(1, [letter("a")])
    deep = one.add(2, [letter("c")])
    other.add(0, [letter("x"), letter("y")])
    same = other.add(2, [letter("z")])
    assert one.first_sample(deep[0]) == other.first_sample(same[0])
    numbers = {one.first_sample(node) for node in range(len(one.nodes))}
    assert len(numbers) == len(one.nodes) and max(numbers) < 2**31
    assert tree_of(search=1).first_sample(0) != one.first_sample(0)


def test_equal_steps_are_one_node_and_all_of_them_cost() -> None:
    tree = tree_of()
    assert tree.add(0, [letter("a"), letter("b"), letter("a")]) == [1, 2]
    assert tree.add(0, [letter("b"), letter("c")]) == [3]
    assert [node.samples for node in tree.nodes[1:]] == [2, 2, 1] and tree.generated == 5
    assert tree.nodes[0].children == [1, 2, 3]


def test_the_longest_steps_decide_what_is_affordable() -> None:
    tree = SearchTree(0, 0, 100, 8)
    tree.generated = 20
    wanted = [Expansion(1, 2), Expansion(2, 2), Expansion(3, 2)]
    assert affordable(wanted, tree, 20 + 47) == wanted[:2]
    assert affordable(wanted, tree, 20 + 48) == wanted
    assert affordable(wanted, tree, 20 + 15) == []


def test_a_solution_without_room_for_a_step_is_cut_off() -> None:
    tree = SearchTree(0, 0, 10, 4)
    tree.add(0, [letter("a", tokens=6), letter("b", tokens=7), letter("c", tokens=7, last=True)])
    assert [node.state for node in tree.nodes] == ["open", "open", "truncated", "complete"]


def solutions_tree() -> SearchTree:
    """Solutions of the answers x, x (sampled twice), y, and one without an answer."""
    tree = tree_of()
    steps = [letter(t, last=True) for t in "abcdb"]
    for node, known in zip(tree.add(0, steps), (0.3, 0.3, 0.8, 0.9), strict=True):
        tree.nodes[node].value = known
    return tree


ANSWERS = {1: "x", 2: "x", 3: "y", 4: None}


def test_choices_by_hand() -> None:
    tree = solutions_tree()

    def answer_of(_: SearchTree, node: int) -> str | None:
        return ANSWERS[node]

    assert ranked_solutions(tree) == [4, 3, 1, 2]
    assert best_solution(tree, "value", answer_of) == 4
    # x: 0.3 + 2 x 0.3, as `b` was sampled twice; y: 0.8.
    assert best_solution(tree, "votes", answer_of) == 1
    assert best_solution(tree, "visits", answer_of) == 4  # nothing was visited
    tree.nodes[2].visits = 3
    assert best_solution(tree, "visits", answer_of) == 2
    assert Fraction(3, 5) == Fraction(agreement(tree, 1, answer_of)).limit_denominator(100)
    assert agreement(tree, 4, answer_of) == 0
    empty = tree_of()
    assert best_solution(empty, "votes", answer_of) == 0
    empty.add(0, [letter("a"), letter("b")])
    empty.nodes[2].value = 0.7
    assert best_solution(empty, "votes", answer_of) == 2  # the best beginning, of no solution


def test_a_budget_below_one_step_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="budget_tokens = 11 is smaller than one step: .*3 x 4 = 12"
    ):
        beam(budget_tokens=11, expansions=3, max_step_tokens=4)
    with pytest.raises(ValueError, match="smaller than one step"):
        mcts(budget_tokens=11, expansions=3, max_step_tokens=4)
