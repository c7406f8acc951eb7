"""Structured answers: what is the same, what is another, and what cannot be read."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.rewards import REWARDS, Outcome, RewardInput, Score, check_reward
from r1jax.rewards.structure import structure_key
from r1jax.rewards.symbolic import UnreadableReference

KNIGHTS = '{"Alice": "knight", "Bob": "knave"}'


def score(answer: str, reference: str = KNIGHTS) -> Score:
    completion = f"<think>Hm.</think><answer>{answer}</answer>"
    return REWARDS["structure"].function(RewardInput("p", completion, reference), {})


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (KNIGHTS, KNIGHTS),
        (KNIGHTS, '{"bob":"KNAVE" ,\n "ALICE ":" knight"}'),
        (KNIGHTS, f"```json\n{KNIGHTS}\n```"),
        (KNIGHTS, "Alice: knight\nBob: knave"),
        (KNIGHTS, "\nBob = knave.\n\nAlice = knight\n"),
        (KNIGHTS, "Alice: knight, Bob: knave."),
        (KNIGHTS, "Alice: knight; Bob: knave;"),
        (KNIGHTS, "- **Alice**: knight\n* Bob:  knave"),
        (KNIGHTS, "Alice\uff1aknight\uff0cBob\uff1aknave\u3002"),
        (KNIGHTS, "\\text{Alice}: \\text{knight}, \\text{Bob}: \\text{knave}"),
        ("Alice: knight\nBob: knave", KNIGHTS),
        ("Alice: knight", "alice = Knight"),
        ('{"x": 3, "y": -0.5, "ok": true, "z": null}', "x = 3.0, y = -0.50, ok = True, z = null"),
        ('{"x": "3"}', "x = 3"),
        ('{"houses": ["red", "blue"]}', 'Houses: ["Red", "Blue"]'),
        ('{"houses": "red, blue"}', "houses: red, blue"),
        ('{"start": "10:30"}', "start: 10:30"),
        ('{"a": {"b": [1, {"c": 2, "d": []}]}}', '{"a": {"b": [1.0, {"d": [], "c": 2}]}}'),
        ("[[1, 2], [3, 4]]", "[[1,2],[3,4]]"),
        ("[]", "[ ]"),
        ('"Monday"', "monday"),
        ('"Monday"', '"monday"'),
        ('"New  York"', "**New York**."),
        ('"Monday"', "\\text{Monday}"),
        ("7", "7"),
        ("7", '"7"'),
        ("true", "True"),
        ("1e3", "1000"),
    ],
)
def test_right(reference: str, answer: str) -> None:
    got = score(answer, reference)
    assert (got.reward, got.outcome) == (1.0, Outcome.RIGHT)
    assert got.extracted == structure_key(reference)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (KNIGHTS, '{"Alice": "knight", "Bob": "knight"}'),
        (KNIGHTS, '{"Alice": "knight"}'),  # a part is not enough
        (KNIGHTS, '{"Alice": "knight", "Bob": "knave", "Carol": "knave"}'),
        (KNIGHTS, '["knight", "knave"]'),
        (KNIGHTS, "Alice: knight"),
        (KNIGHTS, f"[{KNIGHTS}]"),
        (KNIGHTS, '"knight"'),
        ('{"x": 1}', '{"x": true}'),
        ('{"x": 0}', '{"x": null}'),
        ('{"x": 1}', '{"x": [1]}'),
        ('{"x": 0.1}', '{"x": 0.10000001}'),
        ('{"x": ""}', '{"x": "."}'),
        ('{"x": "007"}', '{"x": 7}'),
        ("[1, 2]", "[2, 1]"),
        ("[1, 2]", "[1, 2, 2]"),
        ("[[1, 2], [3]]", "[1, 2, 3]"),
        ("9007199254740993", "9007199254740992"),
        ("7", "8"),
        ("7", "seven"),
        ('"Monday"', "Monday or Tuesday"),
        ('"Monday"', "day: Monday"),
    ],
)
def test_wrong(reference: str, answer: str) -> None:
    assert score(answer, reference).outcome is Outcome.WRONG
    assert score(answer, reference).reward == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "Alice is a knight and Bob is a knave",
        "{'Alice': 'knight', 'Bob': 'knave'}",
        '{"Alice": "knight", "Bob": "knave"',
        '{"Alice": "knight", "Bob": "knave"} I think',
        '{"Alice": "knight", "Alice": "knight", "Bob": "knave"}',
        '{"Alice": "knight", "ALICE": "knave"}',
        "Alice: knight\nBob: knave\nAlice: knave",
        "Alice: knight\nBob is a knave",
        "Alice:\nBob: knave",
        ": knight",
        '{"x": NaN}',
        '{"x": -Infinity}',
        '{"x": 1e999}',
        "x: NaN",
        "x: [red, blue]",
        "x == 3",
        "__import__('os').system('true')",
        "[" * 100_000,
        '{"a":' * 100_000,
        "x: " + "[" * 100_000,
        "9" * 5000,
    ],
)
def test_unparseable_is_not_wrong(answer: str) -> None:
    got = score(answer)
    assert (got.reward, got.outcome, got.extracted) == (0.0, Outcome.UNPARSEABLE, answer)


def test_no_final_answer_is_unparseable() -> None:
    row = RewardInput("p", f"<think>{KNIGHTS}", KNIGHTS)
    assert REWARDS["structure"].function(row, {}) == Score(0.0, Outcome.UNPARSEABLE)


def test_json_in_a_box() -> None:
    row = RewardInput("p", f"<think>a</think>\\boxed{{{KNIGHTS}}}", KNIGHTS)
    assert REWARDS["structure"].function(row, {}).outcome is Outcome.RIGHT


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "neither JSON"),
        ("knight", "neither JSON .* nor lines of `key: value`"),
        ('{"x": 1, "x": 2}', "the key 'x' occurs twice"),
        ('{"x": NaN}', "NaN is no number of JSON"),
        ("1e999", "out of range"),
        ("x: [red, blue]", r"the value '\[red, blue\]' is not JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_bad_reference_fails_the_row_and_not_the_model(reference: str, message: str) -> None:
    with pytest.raises(UnreadableReference, match=message):
        score(KNIGHTS, reference)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False).filter(
    lambda x: abs(x) < 1e300
) | st.sampled_from(["red", "Blue", "", "a b", "3", "x=y", "$5", "."])  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "B", "long key", "1"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def shuffled(value: Any, seed: int) -> Any:
    """The same structure with its keys in another order and in capitals."""
    if isinstance(value, list):
        return [shuffled(each, seed) for each in value]
    if isinstance(value, dict):
        pairs = [(key.upper(), shuffled(each, seed)) for key, each in value.items()]
        random.Random(seed).shuffle(pairs)
        return dict(pairs)
    return value


@given(VALUES, st.integers(0, 9), st.sampled_from([None, 2]))
def test_order_of_keys_case_and_layout_do_not_matter(value: Any, seed: int, indent: Any) -> None:
    other = json.dumps(shuffled(value, seed), indent=indent)
    assert structure_key(json.dumps(value)) == structure_key(other)
    # The key is JSON, and a key of itself.
    assert structure_key(structure_key(other)) == structure_key(other)


def plain_form(value: Any) -> Any:
    """An independent statement of when two structures are the same."""
    if isinstance(value, list):
        return ["list", *map(plain_form, value)]
    if isinstance(value, dict):
        return {key.lower(): plain_form(each) for key, each in value.items()}
    if isinstance(value, bool) or value is None:
        return ["constant", str(value)]
    if isinstance(value, int | float) or value == "3":
        return ["number", float(value) if isinstance(value, float) else int(value)]
    return ["text", value.lower()]


@given(VALUES, VALUES)
def test_different_structures_have_different_keys(left: Any, right: Any) -> None:
    same = structure_key(json.dumps(left)) == structure_key(json.dumps(right))
    assert same == (plain_form(left) == plain_form(right))


@pytest.mark.parametrize(
    "answer", ["- " + " " * 100_000 + "x", "a" * 100_000, "a:" + " " * 100_000]
)
def test_long_lines_take_linear_time(answer: str) -> None:
    """Quadratic time would be minutes."""
    assert score(answer).outcome is Outcome.UNPARSEABLE


def test_no_options() -> None:
    with pytest.raises(ValueError, match="rewards.structure.options.strict: no such option"):
        check_reward("structure", {"strict": True})
