"""Which prompts a run sees, in which order, on how many processes, and after a restart."""

import json
import re

import numpy as np
import pytest

from r1jax.data.example import Example
from r1jax.data.order import permutation
from r1jax.data.prompts import Prompt, PromptBatch, PromptIterator, encode_prompt, encode_prompts
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


def ids(prompts: list[Prompt] | PromptBatch) -> list[int]:
    return [
        prompt.id for prompt in (prompts.prompts if isinstance(prompts, PromptBatch) else prompts)
    ]


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
    iterator = PromptIterator(prompts, seed=3)
    stream = [i for _ in range(13) for i in ids(iterator.take(3))]  # 39 = 3 epochs
    epochs = [stream[:13], stream[13:26], stream[26:]]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream[:13] != ids(PromptIterator(prompts, seed=4).take(13))
    assert stream == ids(PromptIterator(prompts, seed=3).take(39))


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_the_slices_of_all_processes_are_the_single_process_order(tokenizer, processes) -> None:
    prompts = make_prompts(tokenizer, 10)
    alone = PromptIterator(prompts, seed=0)
    shards = [
        PromptIterator(prompts, seed=0, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for _ in range(5):  # Crosses epochs inside a take.
        expected = ids(alone.take(6))
        assert [i for shard in shards for i in ids(shard.take(6))] == expected
        states = [shard.state() for shard in shards]
        assert all(state == alone.state() for state in states)


@pytest.mark.parametrize("before", [0, 1, 4, 5, 9])
def test_restored_state_continues_exactly_even_on_more_processes(tokenizer, before) -> None:
    prompts = make_prompts(tokenizer, 10)
    iterator = PromptIterator(prompts, seed=1)
    for _ in range(before):
        iterator.take(4)
    state = json.loads(json.dumps(iterator.state()))
    expected = [ids(iterator.take(4)) for _ in range(6)]
    resumed = [PromptIterator(prompts, seed=1, process_index=p, process_count=2) for p in range(2)]
    for shard in resumed:
        shard.take(8)  # Wherever it was before: restoring must forget that.
        shard.restore(state)
    for row in expected:
        assert [i for shard in resumed for i in ids(shard.take(4))] == row


def test_a_state_of_other_data_or_seed_is_refused(tokenizer) -> None:
    prompts = make_prompts(tokenizer, 10)
    state = PromptIterator(prompts, seed=1).state()
    with pytest.raises(ValueError, match="seed 1, this run has 2"):
        PromptIterator(prompts, seed=2).restore(state)
    changed_answer = [*prompts]
    changed_answer[3] = encode_prompt(Example(3, "3+1=", "5"), section(), tokenizer)
    changed_prompt = [*prompts]
    changed_prompt[3] = encode_prompt(Example(3, "3+2=", "4"), section(), tokenizer)
    for other in (prompts[:-1], changed_answer, changed_prompt, prompts[::-1]):
        with pytest.raises(ValueError, match="has changed"):
            PromptIterator(other, seed=1).restore(state)


def test_takes_that_processes_cannot_share_are_refused(tokenizer) -> None:
    prompts = make_prompts(tokenizer, 4)
    iterator = PromptIterator(prompts, seed=0, process_index=1, process_count=2)
    for count in (3, 0, -2):
        with pytest.raises(ValueError, match=re.escape(f"cannot take {count} items")):
            iterator.take(count)
    with pytest.raises(ValueError, match="process_index = 2"):
        PromptIterator(prompts, seed=0, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="at least one prompt"):
        PromptIterator([], seed=0)


def test_a_permutation_is_fixed_for_ever() -> None:
    """Pinned: another order after an upgrade would break every resumed run without a word."""
    assert permutation(10, 0, 0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    orders = {tuple(permutation(10, *key).tolist()) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(orders) == 4
    assert permutation(0, 1).tolist() == []
    firsts = np.bincount([permutation(4, seed)[0] for seed in range(2000)], minlength=4)
    assert firsts.min() > 420  # 500 expected, standard deviation 19.


@pytest.mark.parametrize("processes", [1, 2])
def test_repeats_count_what_a_take_holds_twice_on_any_process(tokenizer, processes) -> None:
    prompts = make_prompts(tokenizer, 4)
    shards = [
        PromptIterator(prompts, seed=0, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    for _ in range(3):  # 6 of 4: every take holds two or more prompts twice
        taken = [shard.take(6) for shard in shards]
        pairs = [pair for part in taken for pair in zip(ids(part), part.repeats, strict=True)]
        assert len(set(pairs)) == 6
        assert sorted(repeat for _, repeat in pairs) == [0, 0, 0, 0, 1, 1]
