"""Which prompts a run sees, in which order, on how many processes, and after a restart."""

import json

import numpy as np
import pytest

from r1jax.data.example import Example
from r1jax.data.order import permutation
from r1jax.data.prompts import Prompt, PromptStream, encode_prompt, encode_prompts
from r1jax.data.tokenizers import load_tokenizer
from r1jax.settings.data import DataSection


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("characters:running_total")


def section(**settings) -> DataSection:
    return DataSection.model_validate(
        {"source": "task:running_total", "template": "plain", **settings}
    )


def make_prompts(tokenizer, count: int, start: int = 0) -> list[Prompt]:
    examples = [Example(id=start + i, prompt=f"{i}+1=", answer=str(i + 1)) for i in range(count)]
    return encode_prompts(examples, section(), tokenizer)[0]


def ids(prompts: list[Prompt]) -> list[int]:
    return [prompt.id for prompt in prompts]


def following(stream: PromptStream, count: int) -> list[int]:
    return [stream.prompts[stream.following()].id for _ in range(count)]


def test_too_long_prompts_are_dropped_and_counted(tokenizer) -> None:
    examples = [Example(id=i, prompt="1" * (i + 1), answer="") for i in range(10)]
    prompts, report = encode_prompts(examples, section(max_prompt_tokens=6), tokenizer)
    assert ids(prompts) == [0, 1, 2, 3, 4, 5]
    assert report == "6 of 10 prompts; 4 too long (the longest has 10 tokens)"


def test_batched_encoding_equals_one_at_a_time(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("r1jax.data.prompts._BATCH", 3)
    examples = [Example(id=i, prompt="1+" * i + "1=", answer="x") for i in range(10)]
    prompts, _ = encode_prompts(examples, section(), tokenizer)
    for example, prompt in zip(examples, prompts, strict=True):
        single = encode_prompt(example, section(), tokenizer)
        assert prompt.text == single.text and prompt.id == example.id
        np.testing.assert_array_equal(prompt.token_ids, single.token_ids)


def test_no_prompt_left_is_an_error(tokenizer) -> None:
    examples = [Example(id=0, prompt="1+1=", answer="2")]
    with pytest.raises(ValueError, match=r"tokens: all 1 prompts have more than 3 .* has 4,"):
        encode_prompts(examples, section(max_prompt_tokens=3), tokenizer)
    with pytest.raises(ValueError, match="no examples"):
        encode_prompts([], section(), tokenizer)
    with pytest.raises(ValueError, match="row 5 has an empty prompt"):
        encode_prompts([Example(id=5, prompt="", answer="2")], section(), tokenizer)


def test_every_epoch_visits_everything_once_in_another_order(tokenizer) -> None:
    prompts = make_prompts(tokenizer, 13)
    stream = following(PromptStream(prompts, seed=3), 39)  # 3 epochs
    epochs = [stream[:13], stream[13:26], stream[26:]]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream[:13] != following(PromptStream(prompts, seed=4), 13)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptStream([], seed=0)


@pytest.mark.parametrize("before", [0, 1, 4, 5, 9])
def test_restored_state_continues_exactly(tokenizer, before) -> None:
    prompts = make_prompts(tokenizer, 10)
    stream = PromptStream(prompts, seed=1)
    following(stream, 4 * before)
    state = json.loads(json.dumps(stream.state()))
    expected = following(stream, 24)
    resumed = PromptStream(prompts, seed=1)
    following(resumed, 8)  # wherever it was before: restoring must forget that
    resumed.restore(state)
    assert following(resumed, 24) == expected


def test_a_state_of_other_data_or_seed_is_refused(tokenizer) -> None:
    prompts = make_prompts(tokenizer, 10)
    state = PromptStream(prompts, seed=1).state()
    with pytest.raises(ValueError, match="seed 1, this run has 2"):
        PromptStream(prompts, seed=2).restore(state)
    changed_answer = [*prompts]
    changed_answer[3] = encode_prompt(Example(3, "3+1=", "5"), section(), tokenizer)
    changed_prompt = [*prompts]
    changed_prompt[3] = encode_prompt(Example(3, "3+2=", "4"), section(), tokenizer)
    for other in (prompts[:-1], changed_answer, changed_prompt, prompts[::-1]):
        with pytest.raises(ValueError, match="has changed"):
            PromptStream(other, seed=1).restore(state)


def test_a_permutation_is_fixed_for_ever() -> None:
    """Pinned: another order after an upgrade would break every resumed run without a word."""
    assert permutation(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    orders = {tuple(permutation(10, *key).tolist()) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(orders) == 4
    assert permutation(0, 1).tolist() == []
    firsts = np.bincount([permutation(4, seed)[0] for seed in range(2000)], minlength=4)
    assert firsts.min() > 420  # 500 expected, standard deviation 19.
