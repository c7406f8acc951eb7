"""Steps of texts, and the tokens in which they end, of a byte-level BPE made here."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from r1jax.data.steps import TokenSteps, cut_steps, first_step_end, join_steps, step_ends
from r1jax.settings.section import SettingError
from r1jax.settings.steps import StepRule

LINES = StepRule(separators=["\n\n"])


def test_steps_by_hand() -> None:
    assert cut_steps("a=1\n\nb=2\n\nc", LINES) == ["a=1\n\n", "b=2\n\n", "c"]
    assert step_ends("a=1\n\nb=2\n\nc", LINES) == [5, 10, 11]
    # A separator behind the last step, and white space behind that, begin no other.
    assert cut_steps("a\n\nb\n\n \n", LINES) == ["a\n\n", "b\n\n \n"]
    assert step_ends("a\n\nb\n\n \n", LINES) == [3, 6]
    # What has nothing to see before its separator belongs to the step behind it.
    assert cut_steps("\n\na\n\n\n\n\n\nb", LINES) == ["\n\na\n\n", "\n\n\n\nb"]
    assert cut_steps(" \n\n ", LINES) == [] == cut_steps("", LINES)
    assert cut_steps("one line\nand another", LINES) == ["one line\nand another"]


def test_of_two_separators_that_begin_alike_the_longer_one_is_meant() -> None:
    assert cut_steps("a\n\nb\nc", StepRule(separators=["\n", "\n\n"])) == ["a\n\n", "b\n", "c"]
    assert cut_steps("a.b", StepRule(separators=["."])) == ["a.", "b"]  # no expression


def test_patterns() -> None:
    sentences = StepRule(pattern=r"[^.]+\.\s*")
    assert cut_steps("So a. Then b. c", sentences) == ["So a. ", "Then b. ", "c"]
    before = StepRule(pattern=r"(?=Step \d)")  # of no width
    assert cut_steps("Step 1: a Step 2: b", before) == ["Step 1: a ", "Step 2: b"]
    with pytest.raises(ValueError, match="no regular expression"):
        StepRule(pattern="(")
    with pytest.raises(ValueError, match="not both"):
        StepRule(pattern="a", separators=["b"])


def test_a_pattern_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1jax.data.limits.PATTERN_SECONDS", 0.2)
    endless, text = StepRule(pattern=r"(?:[a-z]+)+;"), "a" * 60
    for cut in (cut_steps, step_ends, first_step_end):
        with pytest.raises(SettingError, match=r"step_rule\.pattern: takes longer than 0.2 s"):
            cut(text, endless)


def test_joining_puts_a_separator_where_there_is_none() -> None:
    assert join_steps(["a", "b\n\n", "c"], LINES) == "a\n\nb\n\nc"
    assert join_steps(["a"], LINES) == "a"
    given = StepRule(pattern=r"[.!]\s", join=" ")
    assert join_steps(["a.", "b! ", "c"], given) == "a. b! c"
    text = "x\n\ny\n\n"
    assert join_steps(cut_steps(text, LINES), LINES) == text


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """As of Qwen and Llama 3: bytes, merged; a character may be several tokens, and a token may
    hold a step's end and the beginning of the next step."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    corpus = ["so x=1;so y=2;so z=3;"] * 20 + ["first\n\nthen\n\n"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize(
    "text",
    [
        "so x=1;so y=2;so z=3;",
        "first\n\nthen\n\nlast",
        "é=1;加=2;🙂;so",  # characters of two to four tokens
        ";;so;",
        "no separator",
    ],
)
def test_a_step_ends_with_the_first_token_that_makes_it_whole(text: str) -> None:
    tokenizer, rule = byte_level_bpe(), StepRule(separators=[";", "\n\n"])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    ends = TokenSteps(tokenizer, rule).ends(ids)
    # By hand: decode beginning after beginning.
    expected = [
        next(n for n in range(len(ids)) if tokenizer.decode(ids[: n + 1]).startswith(text[:end]))
        for end in step_ends(text, rule)
    ]
    assert ends == sorted(set(expected))


def test_the_tokenizer_of_the_test_has_what_is_hard() -> None:
    tokenizer = byte_level_bpe()
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("so x=1;so y=2;")]
    assert any(";" in piece[:-1] for piece in pieces)  # a token over the end of a step
    assert len(tokenizer.encode("🙂")) > 1


def test_steps_that_end_in_one_token_are_one_step() -> None:
    tokenizer = byte_level_bpe()
    (token,) = tokenizer.encode("hen")
    letters = TokenSteps(tokenizer, StepRule(pattern="h|e"))
    assert step_ends("hen", letters.rule) == [1, 2, 3]
    assert letters.ends([token]) == [0] and letters.ends([token, token]) == [0, 1]
    assert letters.counts([token, token], [0, 1, 3, 4]) == [0, 1, 1, 2]
