"""What fine-tuning trains: the assistant's part with its end, after what the sampler is given."""

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from r1jax.data.conversations import encode_conversations
from r1jax.data.documents import Document
from r1jax.data.example import Example, Message
from r1jax.data.packing import PackedRows
from r1jax.data.prompts import encode_prompt
from r1jax.data.tokenizers import load_tokenizer
from r1jax.settings.data import DataSection

SPECIAL = ("<bos>", "<eos>", "<|end|>", "<|say|>")
BOS, EOS, END, SAY = range(4)

# [u]1+1?[a]2<eos>[u]2+2?[a]4<eos>
KEEPS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role[0] + ']' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[a]' }}{% endif %}"
)
# As DeepSeek-R1's: what was thought in past turns is gone.
FORGETS = KEEPS.replace("m.content", "m.content.split('</think>')[-1]")
# As DeepSeek-R1's of 2025: it opens the thought itself, and past turns have none.
OPENS = FORGETS.replace("{{ '[a]' }}", "{{ '[a]<think>\\n' }}")
# As Qwen2.5's: every turn has an end token of its own, and white space behind it.
MARKED = (
    "{% for m in messages %}{{ '<|say|>' + m.role[0] + '\\n' + m.content + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|say|>a\\n' }}{% endif %}"
)


def tokenizer_of(chat_template: str | None, **settings: Any) -> PreTrainedTokenizerFast:
    """One token per ASCII character; adds BOS and EOS by itself, as some tokenizers do."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *characters))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **{"bos_token": "<bos>", "eos_token": "<eos>", **settings},
    )


def section(**settings: Any) -> DataSection:
    return DataSection.model_validate({"source": "jsonl:rows.jsonl", **settings})


def encode(
    example: Example,
    chat_template: str | None = KEEPS,
    stop_ids: tuple[int, ...] = (EOS,),
    **settings: Any,
) -> Document:
    (document,) = encode_conversations(
        [example],
        section=section(**settings),
        tokenizer=tokenizer_of(chat_template),
        stop_ids=stop_ids,
    )
    return document


def runs(document: Document) -> list[tuple[bool, str]]:
    """The document as text, cut where training begins and ends."""
    decode = tokenizer_of(None).decode
    pairs = zip(document.trained.tolist(), document.tokens.tolist(), strict=True)
    return [
        (trained, decode([token for _, token in run]))
        for trained, run in itertools.groupby(pairs, key=lambda pair: pair[0])
    ]


def answered(response: str, prompt: str = "1+1?") -> Example:
    return Example(id=7, prompt=prompt, answer="", response=response)


def talk(*contents: str, system: str | None = None) -> Example:
    """User and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [Message(role, content) for role, content in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
    if system is not None:
        messages.insert(0, Message("system", system))
    return Example(id=7, prompt=contents[0], answer="", messages=tuple(messages))


def test_hand_worked_document() -> None:
    document = encode(answered("2"))
    ids = {c: 5 + ord(c) - 32 for c in "[]ua1+?2"}
    text = [ids[c] for c in "[u]1+1?[a]2"]
    assert document.tokens.tolist() == [BOS, *text, EOS]
    assert document.trained.tolist() == [False] * 11 + [True, True]
    assert (document.tokens.dtype, document.trained.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("template", ["chat", "r1_zero", "plain"])
@pytest.mark.parametrize("chat_template", [KEEPS, FORGETS, OPENS, MARKED])
def test_what_is_given_is_what_the_sampler_is_given(template: str, chat_template: str) -> None:
    """Token for token: the prompt, with what is around it, is that of reinforcement learning."""
    example = answered("so</think>2")
    settings = {"template": template, "prompt_prefix": "2+2=4. ", "prompt_suffix": " Think."}
    document = encode(example, chat_template, **settings)
    prompt = encode_prompt(example, section(**settings), tokenizer_of(chat_template))
    given = document.tokens[~document.trained]
    np.testing.assert_array_equal(given, prompt.token_ids)
    assert document.trained.tolist() == sorted(document.trained.tolist())
    assert (given == BOS).sum() == (0 if (template, chat_template) == ("chat", MARKED) else 1)


@pytest.mark.parametrize("chat_template", [KEEPS, FORGETS])
def test_a_thought_is_trained_even_where_the_template_would_drop_it(chat_template: str) -> None:
    assert runs(encode(answered("<think>1 more</think>2"), chat_template)) == [
        (False, "<bos>[u]1+1?[a]"),
        (True, "<think>1 more</think>2<eos>"),
    ]


@pytest.mark.parametrize(
    ("response", "written"),
    [
        ("so</think>2", "so</think>2"),
        ("<think>\nso</think>2", "so</think>2"),
        ("<think>so</think>2", "so</think>2"),
        ("<think>\n\nso</think>2", "\nso</think>2"),
        ("the tag <think>\nso</think>2", "the tag <think>\nso</think>2"),
    ],
)
def test_a_prefill_belongs_to_the_prompt_and_is_not_given_twice(response, written) -> None:
    assert runs(encode(answered(response), OPENS)) == [
        (False, "<bos>[u]1+1?[a]<think>\n"),
        (True, f"{written}<eos>"),
    ]
    # Without prefill, the tag is the assistant's own.
    assert runs(encode(answered(response), KEEPS))[1] == (True, f"{response}<eos>")


def test_the_turn_ends_in_the_templates_stop_token_or_else_in_eos() -> None:
    endings = {
        KEEPS: "2<eos>",
        MARKED: "2<|end|>",
        KEEPS.replace("{{ eos_token }}", ""): "2<eos>",
        KEEPS.replace("{{ eos_token }}", "{{ '[/a]' }}"): "2<eos>",
        KEEPS.replace("{{ eos_token }}", "{{ ' ' + eos_token }}"): "2 <eos>",
        MARKED.replace("<|end|>", "<|end|><eos>"): "2<|end|>",
    }
    for template, ending in endings.items():
        assert runs(encode(answered("2"), template, (EOS, END)))[-1] == (True, ending), template
    # An end of turn at which the sampler does not stop would not end a completion.
    assert runs(encode(answered("2"), MARKED, (EOS,)))[-1] == (True, "2<eos>")


@pytest.mark.parametrize("stop", ["<eos>", "<|end|>"])
@pytest.mark.parametrize(("chat_template", "end"), [(KEEPS, "<eos>"), (MARKED, "<|end|>")])
def test_a_stop_token_that_the_response_brings_is_not_doubled(stop, chat_template, end) -> None:
    document = encode(answered(f"2{stop}"), chat_template, (EOS, END))
    assert runs(document)[-1] == (True, f"2{end}")


def test_every_turn_is_trained_where_the_template_keeps_the_past() -> None:
    example = talk("1?", "<think>x</think>1", "2?", "<think>y</think>2", "3?", "3", system="sys")
    assert runs(encode(example, KEEPS)) == [
        (False, "<bos>[s]sys[u]1?[a]"),
        (True, "<think>x</think>1<eos>"),
        (False, "[u]2?[a]"),
        (True, "<think>y</think>2<eos>"),
        (False, "[u]3?[a]"),
        (True, "3<eos>"),
    ]
    # What the template puts behind the stop token is not for the assistant to write.
    assert runs(encode(talk("1?", "1", "2?", "2"), MARKED, (EOS, END))) == [
        (False, "<|say|>u\n1?<|end|>\n<|say|>a\n"),
        (True, "1<|end|>"),
        (False, "\n<|say|>u\n2?<|end|>\n<|say|>a\n"),
        (True, "2<|end|>"),
    ]


def test_turns_that_the_template_rewrites_are_given_but_not_trained() -> None:
    example = talk("1?", "<think>x</think>1", "2?", "2", "3?", "<think>z</think>3")
    assert runs(encode(example, FORGETS)) == [
        (False, "<bos>[u]1?[a]1<eos>[u]2?[a]"),
        (True, "2<eos>"),  # It had no thought to lose.
        (False, "[u]3?[a]"),
        (True, "<think>z</think>3<eos>"),
    ]
    assert runs(encode(example, OPENS)) == [
        (False, "<bos>[u]1?[a]1<eos>[u]2?[a]2<eos>[u]3?[a]<think>\n"),
        (True, "z</think>3<eos>"),
    ]
    # In this history no turn has a stop token, in what the sampler writes each has.
    assert runs(encode(talk("1?", "1", "2?", "2"), KEEPS.replace("{{ eos_token }}", ""))) == [
        (False, "<bos>[u]1?[a]1[u]2?[a]"),
        (True, "2<eos>"),
    ]


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert runs(encode(talk("1?", "1", "thanks"))) == runs(encode(talk("1?", "1")))
    assert runs(encode(talk("1?", "1"))) == runs(encode(answered("1", "1?")))


def test_an_assistant_that_speaks_unasked_is_given() -> None:
    hello = Example(
        0, "1?", "", messages=(Message("assistant", "hello"), *talk("1?", "1").messages)
    )
    assert runs(encode(hello)) == [(False, "<bos>[a]hello<eos>[u]1?[a]"), (True, "1<eos>")]
    more = (*talk("1?", "1").messages, Message("assistant", "or 2"), *talk("3?", "3").messages)
    assert runs(encode(Example(0, "1?", "", messages=more))) == [
        (False, "<bos>[u]1?[a]"),
        (True, "1<eos>"),
        (False, "[a]or 2<eos>[u]3?[a]"),
        (True, "3<eos>"),
    ]


def test_system_prompt_and_suffix() -> None:
    settings = {"system_prompt": "Be brief.", "prompt_suffix": " Go."}
    two = talk("1?", "1", "2?", "2")
    given = "".join(text for _, text in runs(encode(two, KEEPS, **settings)))
    assert given == "<bos>[s]Be brief.[u]1? Go.[a]1<eos>[u]2? Go.[a]2<eos>"
    own = encode(talk("1?", "1", system="Mine."), KEEPS, **settings)
    assert runs(own)[0] == (False, "<bos>[s]Mine.[u]1? Go.[a]")


CONTENT = st.text("a1 ?\n<>", max_size=6).map(lambda text: f"x{text}")


@given(contents=st.lists(CONTENT, min_size=2, max_size=7), template=st.sampled_from([KEEPS, OPENS]))
def test_a_document_is_the_last_prompt_and_its_answer(contents, template) -> None:
    """Whatever is trained before: training flags mark a text, they do not change it."""
    contents = contents[: len(contents) // 2 * 2]
    document = encode(talk(*contents), template)
    tokenizer = tokenizer_of(template)
    turns = [
        {"role": r, "content": c}
        for r, c in zip(itertools.cycle(("user", "assistant")), contents, strict=False)
    ]
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    if template is OPENS:  # none of them has a thought: an empty one is closed
        contents[-1] = f"\n</think>\n\n{contents[-1]}"
    assert tokenizer.decode(document.tokens) == f"{prompt}{contents[-1]}<eos>"
    assert document.trained[-1] and document.tokens[-1] == EOS
    trained = "".join(text for trained, text in runs(document) if trained)
    written = contents[1::2] if template is KEEPS else contents[-1:]
    assert trained == "".join(f"{content}<eos>" for content in written)


CLOSES = OPENS.replace("[a]<think>\\n", "[a]<think>\\n\\n</think>\\n\\n")


@pytest.mark.parametrize(
    ("template", "response", "trained"),
    [
        (OPENS, "2", "\n</think>\n\n2<eos>"),
        (OPENS, "\n\n2", "\n</think>\n\n\n\n2<eos>"),
        (OPENS.replace("think>\\n", "think>"), "2", "\n\n</think>\n\n2<eos>"),
        (OPENS, "<think>\na</think>2", "a</think>2<eos>"),
        (OPENS, "a</think>2", "a</think>2<eos>"),
        (CLOSES, "2", "2<eos>"),
        (CLOSES, "<think>\n\n</think>\n\n2", "2<eos>"),
        (KEEPS, "2", "2<eos>"),
        (KEEPS, "<think>a", "<think>a<eos>"),
    ],
)
def test_a_thought_that_the_prompt_opens_is_closed(
    template: str, response: str, trained: str
) -> None:
    assert runs(encode(answered(response), template))[-1] == (True, trained)


@pytest.mark.parametrize(
    ("template", "response", "message"),
    [
        (OPENS, "<think>\na 2", "row 7: the assistant's thought has no </think>"),
        (OPENS, " <think>a 2", "row 7: the assistant's thought has no </think>"),
        (CLOSES, "<think>a</think>2", "row 7: .* has a thought, and the chat template has closed"),
    ],
)
def test_a_thought_that_cannot_be_is_refused(template: str, response: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(answered(response), template)


SWITCHED = CLOSES.replace(
    "{{ '[a]<think>\\n\\n</think>\\n\\n' }}",
    "{{ '[a]' if enable_thinking is not defined else '[a]<think>\\n' if enable_thinking else "
    "'[a]<think>\\n\\n</think>\\n\\n' }}",
)


def test_variables_of_the_chat_template() -> None:
    def opening(**settings: Any) -> str:
        return encode_prompt(answered("2"), section(**settings), tokenizer_of(SWITCHED)).prefill

    assert opening() == ""
    assert opening(chat_template_kwargs={"enable_thinking": True}) == "<think>\n"
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert opening(**off) == "<think>\n\n</think>\n\n"
    assert runs(encode(answered("2"), SWITCHED, **off))[-1] == (True, "2<eos>")
    for settings, message in (
        ({"enable_thinkin": True}, "enable_thinkin: .*did you mean 'enable_thinking'"),
        ({"tokenize": True}, "chat_template_kwargs.tokenize: r1jax sets it"),
    ):
        with pytest.raises(ValueError, match=message):
            opening(chat_template_kwargs=settings)
    with pytest.raises(ValueError, match="chat_template_kwargs: template = 'plain' cannot hold"):
        opening(template="plain", **off)


def test_a_prompt_that_is_a_conversation() -> None:
    history = (Message("system", "Be brief."), Message("user", "1?"), Message("assistant", "1"))
    example = replace(answered("2", "2?"), history=history)
    settings = {"system_prompt": "Another.", "prompt_suffix": " Go."}
    prompt = encode_prompt(example, section(**settings), tokenizer_of(KEEPS))
    assert prompt.text == "<bos>[s]Be brief.[u]1?[a]1<eos>[u]2? Go.[a]"
    document = encode(example, KEEPS)
    given = encode_prompt(example, section(), tokenizer_of(KEEPS)).text
    assert "".join(text for _, text in runs(document)) == f"{given}2<eos>"
    with pytest.raises(ValueError, match="'plain' has a place for one question .* not for system,"):
        encode_prompt(example, section(template="plain"), tokenizer_of(None))


def test_a_batch_is_its_examples_one_by_one() -> None:
    examples = [answered("2"), talk("1?", "1", "2?", "2"), answered("<think>x</think>3")]
    together = encode_conversations(
        examples, section=section(), tokenizer=tokenizer_of(KEEPS), stop_ids=(EOS,)
    )
    assert [runs(d) for d in together] == [runs(encode(e)) for e in examples]


def test_conversations_are_packed_like_any_documents() -> None:
    tokenizer = tokenizer_of(MARKED)
    examples = [answered("2" * n, f"{n}?") for n in range(1, 9)]

    def conversations(batch):
        return encode_conversations(
            batch, section=section(), tokenizer=tokenizer, stop_ids=(EOS, END)
        )

    rows = PackedRows(examples, conversations, tokenizer, row_tokens=48, seed=0)
    found = []
    while rows.epoch == 0:
        (tokens,), _, _, (trained,) = rows.take(1).values()
        found += tokenizer.decode(tokens[trained]).removesuffix("<|end|>").split("<|end|>")
    assert sorted(found) == sorted(e.response for e in examples)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(7, "q", "a"), "it has no response to train on; name the column in fields"),
        (answered(""), "the assistant's message is empty"),
        (answered("<eos>"), "the assistant's message is empty"),
        (answered("1<eos>2"), "goes on after a stop token"),
        (
            Example(7, "q", "", response="r", messages=talk("q", "r").messages),
            "a response and mess",
        ),
        (talk("q"), "no answer of the assistant to a user"),
        (Example(7, "q", "", messages=(Message("assistant", "r"),)), "no answer of the assistant"),
        (talk("1?", "1<eos>2", "2?", "2"), "goes on after a stop token"),
    ],
)
def test_rows_without_a_proper_answer_are_named(example: Example, message: str) -> None:
    with pytest.raises(ValueError, match=rf"train row 7: .*{re.escape(message)}"):
        encode(example)


def test_row_mistakes_of_other_templates() -> None:
    with pytest.raises(
        ValueError, match=r"row 7: .*'plain' has a place for one question .* user, "
    ):
        encode(talk("1?", "1", "2?", "2"), template="plain")
    with pytest.raises(ValueError, match=r"row 7: .* not for system, user; use"):
        encode(talk("1?", "1", system="sys"), template="r1_zero")
    tokenizer = tokenizer_of(None, bos_token=None)
    with pytest.raises(ValueError, match="row 7: its prompt has no tokens"):
        encode_conversations(
            [answered("1", "")],
            section=section(template="plain"),
            tokenizer=tokenizer,
            stop_ids=(EOS,),
        )
    refuses = "{{ raise_exception('roles must alternate') if messages | length > 2 }}" + KEEPS
    with pytest.raises(ValueError, match=r"row 7: .*refuses the messages: roles must alternate"):
        encode(talk("1?", "1", "2?", "2"), refuses)


@pytest.mark.parametrize(
    ("chat_template", "settings", "message"),
    [
        (None, {}, "the tokenizer has no chat template"),
        (KEEPS, {"template": "r1-zero"}, "did you mean 'r1_zero'"),
        (KEEPS, {"template": "plain", "system_prompt": "x"}, "cannot hold it"),
        (MARKED.replace("say", "im_start"), {}, "writes '<|im_start|>', which is not a token"),
        (MARKED.replace("<|end|>", "<｜end▁of▁sentence｜>"), {}, "writes '<｜end▁of▁sentence｜>'"),
        ("{{ messages[0].content }}", {}, "leaves out what the assistant says"),
    ],
)
def test_templates_that_lack_something(chat_template, settings, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(answered("1"), chat_template, **settings)


def test_a_turn_that_could_not_end_is_an_error() -> None:
    endless = tokenizer_of(KEEPS, eos_token=None)
    arguments: dict[str, Any] = {"section": section(), "tokenizer": endless}
    with pytest.raises(ValueError, match="no EOS token, and its chat template ends"):
        encode_conversations([answered("1")], stop_ids=(END,), **arguments)
    with pytest.raises(ValueError, match="ends in '<eos>', which .* not encode as a stop token"):
        encode(answered("1"), KEEPS, stop_ids=(END,))


def test_a_character_without_token_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token for 'é'"):
        encode_conversations(
            [answered("é", "1+1=")],
            section=section(template="plain"),
            tokenizer=load_tokenizer("characters:running_total"),
            stop_ids=(1,),
        )
