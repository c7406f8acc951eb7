"""The demo's task: right arithmetic, the promised mixture, and splits that never touch."""

import re
from collections import Counter

import pytest

from r1jax.data.example import split_of
from r1jax.data.tasks import TASKS, task_options
from r1jax.data.tasks.running_total import RunningTotal
from r1jax.data.tasks.task import HELD_OUT_SHARE
from r1jax.data.tokenizers import load_tokenizer

STEP = re.compile(r"(\d+)([+-]\d+)=(\d+)")


def evaluate(prompt: str) -> int:
    """The answer by an independent route: the signed numbers of the prompt, added."""
    return sum(int(term) for term in re.findall(r"[+-]?\d+", prompt))


@pytest.mark.parametrize("options", [{}, {"term_digits": 2, "max_terms": 9}, {"total_digits": 1}])
def test_answers_and_running_totals_are_right_and_in_range(options: dict) -> None:
    task = RunningTotal(**{"guess_spread": 5, **options})
    ceiling = 10**task.total_digits
    for index in range(300):
        example = task.example(index, "train")
        terms = [int(term) for term in re.findall(r"[+-]?\d+", example.prompt)]
        totals = [sum(terms[: i + 1]) for i in range(len(terms))]
        assert example.answer == str(evaluate(example.prompt))
        assert task.min_terms <= len(terms) <= task.max_terms
        assert all(1 <= abs(term) < 10**task.term_digits for term in terms)
        assert all(0 <= total < ceiling for total in totals)
        assert example.text is not None and example.text.startswith(example.prompt)
        tagless = re.sub(r"</?(think|answer)>", "", example.text)
        assert set(tagless) <= set(task.alphabet)


def test_an_example_depends_on_index_and_options_alone() -> None:
    first = [RunningTotal().example(i, "train") for i in range(20)]
    again = [RunningTotal().example(i, "train") for i in reversed(range(20))]
    assert first == again[::-1]
    # Fixed for ever: a changed stream would change every run that is resumed after an upgrade.
    assert first[0].text == "5+1+8=<think>5+1=6 6+8=20</think><answer>20</answer>"
    assert first[0].answer == "14"


def test_held_out_problems_never_occur_in_train_even_when_drawn_again() -> None:
    # A small problem space, drawn many times over: duplicates abound on both sides.
    task = RunningTotal(min_terms=2, max_terms=2, term_digits=1)
    train = [task.example(i, "train").prompt for i in range(3000)]
    held_out = [task.example(i, "held_out").prompt for i in range(300)]
    assert len(set(train)) < len(train) and len(set(held_out)) < len(held_out)
    assert not set(train) & set(held_out)
    share = len(set(held_out)) / len(set(train) | set(held_out))
    assert 0.03 < share < 0.2


def test_splits_of_tasks_with_other_options_are_disjoint_too() -> None:
    """Held out is a property of the problem, not of the settings that happened to make it."""
    narrow, wide = RunningTotal(min_terms=3, max_terms=3), RunningTotal(worked_slip=0.1, guess=0.6)
    train = {narrow.example(i, "train").prompt for i in range(3000)}
    held_out = {wide.example(i, "held_out").prompt for i in range(3000)}
    assert not train & held_out


def test_split_is_a_stable_hash_that_ignores_white_space() -> None:
    prompts = [f"question {i}" for i in range(4000)]
    held_out = [p for p in prompts if split_of(p, HELD_OUT_SHARE) == "held_out"]
    assert 0.08 < len(held_out) / len(prompts) < 0.12
    assert all(split_of(f"  {p}\n".replace(" ", "  "), 0.1) == "held_out" for p in held_out)
    # A smaller share is a subset: growing the held-out set never frees a problem for training.
    smaller = {p for p in prompts if split_of(p, 0.05) == "held_out"}
    assert smaller < set(held_out)


def kind_of(text: str) -> str:
    solution = text[text.index("=") + 1 :]
    guess = re.fullmatch(r"<think></think><answer>(\d+)</answer>", solution)
    worked = re.fullmatch(r"<think>([^<]+)</think><answer>(\d+)</answer>", solution)
    answer = evaluate(text[: text.index("=")])
    if guess:
        return "guess_right" if int(guess[1]) == answer else "guess_wrong"
    if not worked:
        return "malformed"
    steps = [tuple(map(int, step)) for step in STEP.findall(worked[1])]
    slips = sum(before + term != after for before, term, after in steps)
    assert int(worked[2]) == steps[-1][2], "the answer is the last total written"
    for (_, _, after), (before, _, _) in zip(steps, steps[1:], strict=False):
        assert before == after, "each step goes on from the one before"
    if slips:
        return "worked_slip"
    assert int(worked[2]) == answer
    return "worked_right"


def test_texts_follow_the_mixture() -> None:
    task = RunningTotal()
    count = 4000
    kinds = Counter(kind_of(task.example(i, "train").text or "") for i in range(count))
    expected = {
        "worked_right": task.worked_right,
        "worked_slip": task.worked_slip,
        "malformed": task.malformed,
        "guess_right": task.guess * task.guess_right,
        "guess_wrong": task.guess * (1 - task.guess_right),
    }
    for kind, share in expected.items():
        assert kinds[kind] / count == pytest.approx(share, abs=0.03), kind


def test_wrong_guesses_are_near_the_truth_and_spread_out() -> None:
    task = RunningTotal(guess=1.0, worked_right=0, worked_slip=0, malformed=0, guess_right=0.0)
    errors: Counter[int] = Counter()
    for index in range(2000):
        example = task.example(index, "train")
        match = re.search(r"<answer>(\d+)", example.text or "")
        assert match is not None
        errors[int(match[1]) - int(example.answer)] += 1
    assert 0 not in errors
    assert max(map(abs, errors)) == task.guess_spread
    # No wrong answer may rival the right one in a vote.
    assert max(errors.values()) / 2000 < 0.1


def test_second_attempts_follow_the_first_and_leave_other_texts_as_they_are() -> None:
    once, twice = RunningTotal(), RunningTotal(second_attempts=0.5)
    tokenizer = load_tokenizer("characters:running_total")
    count = 0
    for index in range(200):
        first, both = once.example(index, "train"), twice.example(index, "train")
        assert (first.prompt, first.answer) == (both.prompt, both.answer)
        text, _, second = (both.text or "").partition("<eos>==")
        assert text == first.text
        count += bool(second)
        assert not second or kind_of(both.prompt + second)
    assert 80 < count < 120
    ids = tokenizer("7<eos>==8", add_special_tokens=False)["input_ids"]
    assert ids[1] == tokenizer.eos_token_id and len(ids) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_term": 4}, "options.max_term: no option of this task; did you mean"),
        ({"min_terms": 1}, "options.min_terms = 1"),
        ({"guess": 0.9}, "add up to 1"),
        ({"guess_right": 1.5}, "options.guess_right = 1.5"),
        ({"second_attempts": 2}, "options.second_attempts = 2"),
        ({"term_digits": 3}, "term_digits <= total_digits"),
        ({"guess_spread": 100}, "options.guess_spread = 100"),
        ({"min_terms": "three"}, "options: "),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        task_options(TASKS["running_total"], options)
