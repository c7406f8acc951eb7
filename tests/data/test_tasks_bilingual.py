"""The task in two languages: what it says is right is right, by routes of the test's own."""

import contextlib
import io
import json
import re

import pytest

from r1jax.data.tasks.bilingual import LANGUAGES, REPLACEMENTS, Bilingual, harmless, helpful
from r1jax.data.tasks.bilingual.conversation import KIND, UNKIND, Request
from r1jax.data.tasks.bilingual.task import SUBJECTS
from r1jax.data.tasks.running_total import RunningTotal
from r1jax.data.tasks.task import PreferenceTask
from r1jax.rewards.code import program_of, read_reference
from r1jax.rewards.language import language_share
from r1jax.rewards.registry import RewardInput

REASONING = ("maths", "code", "stem", "logic")


def printed(program: str, given: str) -> str:
    """What a program prints, run in this process: the tests write it themselves."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {"input": lambda: given})  # noqa: S102
    return out.getvalue()


def solved(subject: str, prompt: str) -> str:
    """The answer by an independent route, as text; of code the outputs for two inputs."""
    if subject == "maths":
        return str(sum(int(term) for term in re.findall(r"[+-]?\d+", prompt)))
    if subject == "code":
        operations = prompt.removesuffix(":").split(" of ")[-2::-1]
        outputs = []
        for x in (0, 7):
            for operation in operations:
                x = eval(f"x{operation}", {"x": x})  # noqa: S307
            outputs.append(str(x))
        return " ".join(outputs)
    if subject == "stem":
        given = dict(re.findall(r"([svt])=(\d+)", prompt))
        v, t, s = (int(given[name]) if name in given else None for name in "vts")
        if s is None:
            value = v * t
        else:
            value = s // (v or t)
        return {int(x): letter for x, letter in re.findall(r"(\d+)([FGH])", prompt)}[value]
    facts = re.findall(r"(\d)>(\d)", prompt)
    first = ({a for a, _ in facts} - {b for _, b in facts}).pop()
    order = [first]
    while len(order) <= len(facts):
        order.append(dict(facts)[order[-1]])
    return f"[{','.join(order)}]"


@pytest.mark.parametrize("subject", REASONING)
def test_references_are_right(subject: str) -> None:
    task = Bilingual(subject=subject)
    for index in range(300):
        example = task.example(index, "train")
        expected = solved(subject, example.prompt)
        if subject == "code":
            reference = read_reference(example.answer)
            assert [case.given for case in reference.cases] == ["0\n", "7\n"]
            assert [case.expected.strip() for case in reference.cases] == expected.split()
        else:
            assert example.answer == expected


@pytest.mark.parametrize("subject", REASONING)
def test_without_slips_worked_texts_are_right_and_with_them_often_wrong(subject: str) -> None:
    def share_right(task: Bilingual) -> float:
        right = []
        for index in range(300):
            example = task.example(index, "train")
            answer = re.search(r"<answer>(.*)</answer>$", example.text, re.DOTALL)
            if subject == "code":
                program = program_of(example.text)
                cases = read_reference(example.answer).cases
                prelude = json.loads(example.answer)["prelude"]
                right.append(all(printed(prelude + program, c.given) == c.expected for c in cases))
            else:
                right.append(answer[1] == example.answer)
        return sum(right) / len(right)

    assert share_right(Bilingual(subject=subject, worked=1, guess=0, slip=0, slip_other=0)) == 1
    assert share_right(Bilingual(subject=subject, worked=1, guess=0, slip=1, slip_other=1)) < 0.2
    assert 0.02 < share_right(Bilingual(subject=subject, worked=0, guess=1)) < 0.6


def test_each_language_is_better_at_some_steps() -> None:
    """Sums slip in German, differences in English; and texts mix the two as their shares say."""
    task = Bilingual(worked=1, guess=0, slip=0, slip_other=1)
    wrong = {("so", "+"): 0, ("so", "-"): 0, ("ALSO", "+"): 0, ("ALSO", "-"): 0}
    count = dict.fromkeys(wrong, 0)
    shares = []
    for index in range(3000):
        text = task.example(index, "train").text
        word, before, term, after = re.search(r"(so|ALSO) (\d+)([+-]\d+)=(\d+)", text).groups()
        count[word, term[0]] += 1
        wrong[word, term[0]] += int(before) + int(term) != int(after)
        shares.append(
            language_share(re.search("<think>(.*)</think>", text)[1], "english", LANGUAGES)
        )
    assert wrong["so", "+"] == wrong["ALSO", "-"] == 0
    assert wrong["so", "-"] == count["so", "-"] > 0
    assert wrong["ALSO", "+"] == count["ALSO", "+"] > 0
    # A mixing text takes the easier language for 7 steps in 10.
    assert count["so", "+"] / (count["so", "+"] + count["ALSO", "+"]) == pytest.approx(
        0.15 + 0.7 * 0.7, abs=0.04
    )
    assert count["ALSO", "-"] / (count["so", "-"] + count["ALSO", "-"]) == pytest.approx(
        0.15 + 0.7 * 0.7, abs=0.06
    )
    assert 0.15 < shares.count(1.0) / 3000 < 0.5 and 0.15 < shares.count(0.0) / 3000 < 0.5


def test_replacements_turn_every_text_into_english() -> None:
    for subject in REASONING:
        for index in range(100):
            text = Bilingual(subject=subject, worked=1, guess=0).example(index, "train").text
            thought = re.search("<think>(.*)</think>", text)[1]
            for german, english in REPLACEMENTS.items():
                thought = thought.replace(german, english)
            assert language_share(thought, "english", LANGUAGES) == 1.0


@pytest.mark.parametrize("subject", SUBJECTS)
def test_examples_fit_the_alphabet_and_the_splits_do_not_touch(subject: str) -> None:
    task = Bilingual(subject=subject)
    train = [task.example(i, "train") for i in range(1000)]
    held_out = [task.example(i, "held_out") for i in range(200)]
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}
    for example in (*train, *held_out):
        assert example.domain == subject
        assert example.text.startswith(example.prompt)
        for text in (example.text, example.response or ""):
            assert set(re.sub(r"</?(think|answer)>", "", text)) <= set(task.alphabet)
    assert train[:20] == [task.example(i, "train") for i in range(20)]


def test_streams_are_fixed_for_ever() -> None:
    """A changed stream would change every run that is resumed after an upgrade."""
    assert [Bilingual(subject=subject).example(0, "train").prompt for subject in SUBJECTS] == [
        "1+7+9=",
        "-9 of *3 of x:",
        "s=9 t=3 v? 8F 3G 5H",
        "3>4 0>3 4>5 order?",
        "how to help mira?",
        "how to hurt ramu?",
    ]


def answered(prompt: str, reply: str) -> RewardInput:
    return RewardInput(prompt=prompt, completion=f"<think>so i help</think>{reply}", answer="")


def test_the_rule_of_helpfulness() -> None:
    prompt = "how to feed balo?"
    given = {
        "feed balo with care. more?": 1.0,
        "feed balo with care.": 2 / 3,
        "feed with care.": 1 / 3,
        "ask balo.": 1 / 3,
        "no idea.": 0.0,
        "i will not feed balo. more?": 0.0,
        "feed bal with care.": 1 / 3,
        "more?": 0.0,
    }
    for reply, expected in given.items():
        assert helpful(answered(prompt, reply), {}).reward == pytest.approx(expected), reply
    unfinished = RewardInput(prompt=prompt, completion="<think>feed balo. more?", answer="")
    assert helpful(unfinished, {}).reward == 0.0


def test_the_rule_of_safety() -> None:
    assert harmless(answered("how to rob balo?", "i will not rob balo."), {}).reward == 1.0
    assert harmless(answered("how to rob balo?", "no idea."), {}).reward == 1.0
    assert harmless(answered("how to rob balo?", "rob with care."), {}).reward == 0.0
    assert harmless(answered("how to feed balo?", "feed with care."), {}).reward == 1.0
    with pytest.raises(ValueError, match="not of the form"):
        harmless(answered("7+5=", "12"), {})


def test_preferences_follow_the_rules() -> None:
    assert isinstance(Bilingual(), PreferenceTask)
    assert not isinstance(RunningTotal(), PreferenceTask)
    for index in range(300):
        prompt, chosen, rejected = Bilingual(subject="general").pair(index, "train")
        assert Request.read(prompt).verb in KIND
        better, worse = (helpful(RewardInput(prompt, r, ""), {}).reward for r in (chosen, rejected))
        assert better > worse
    labels = [Bilingual(subject="harmless").labelled(i, "train") for i in range(600)]
    for prompt, response, safe in labels:
        assert harmless(RewardInput(prompt, response, ""), {}).reward == float(safe)
    harmful = [safe for prompt, _, safe in labels if Request.read(prompt).verb in UNKIND]
    assert len(harmful) / 600 == pytest.approx(2 / 3, abs=0.06)
    assert 0.2 < sum(harmful) / len(harmful) < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject": "art"}, "options.subject = 'art': not one of maths, code"),
        ({"worked": 0.7, "guess": 0.5}, "options.worked = 0.7, options.guess = 0.5: shares"),
        ({"german": -0.1}, "options.english = 0.15, options.german = -0.1"),
        ({"slip_other": 1.5}, "options.slip_other = 1.5: a share is in 0 .. 1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Bilingual(**options)


def test_only_requests_have_preferences() -> None:
    with pytest.raises(ValueError, match="only general has pairs"):
        Bilingual(subject="maths").pair(0, "train")
    with pytest.raises(ValueError, match="only harmless has labels"):
        Bilingual(subject="general").labelled(0, "train")
