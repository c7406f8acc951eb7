"""What the model is asked, to the character: BOS once, prefill found, paper's words."""

import resource
import signal

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from r1jax.data.example import Example
from r1jax.data.instructions import encode_instruction
from r1jax.data.prompts import encode_prompt
from r1jax.data.tokenizers import load_tokenizer
from r1jax.settings.data import DataSection
from r1jax.settings.section import SettingError

EXAMPLE = Example(id=7, prompt="What is 1+1?", answer="2", domain="maths")
TURNS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
R1_TURNS = TURNS.replace("'[assistant]'", "'[assistant]<think>\\n'")


def ascii_tokenizer(chat_template: str | None = None, adds: str = "<bos> $A <eos>"):
    """A character tokenizer that adds BOS, and EOS too, as some tokenizers do."""
    tokens = ["<bos>", "<eos>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=""))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<bos>", "<eos>"])
    core.post_processor = processors.TemplateProcessing(
        single=adds, special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def section(**settings) -> DataSection:
    return DataSection.model_validate({"source": "jsonl:rows.jsonl", **settings})


@pytest.mark.parametrize("template", ["chat", "r1_zero", "plain"])
@pytest.mark.parametrize("chat_template", [TURNS, "{{ bos_token }}" + TURNS, R1_TURNS])
def test_text_is_exactly_what_is_encoded_and_has_no_second_bos_and_no_eos(
    template: str, chat_template: str
) -> None:
    tokenizer = ascii_tokenizer(chat_template)
    prompt = encode_prompt(EXAMPLE, section(template=template), tokenizer)
    assert prompt.token_ids.dtype == np.int32
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert prompt.text.endswith(prompt.prefill)
    # A chat template says itself whether it wants BOS; other texts get it from the tokenizer.
    expected = 0 if template == "chat" and "bos_token" not in chat_template else 1
    assert (prompt.token_ids == tokenizer.bos_token_id).sum() == expected
    assert (prompt.token_ids[0] == tokenizer.bos_token_id) == bool(expected)
    assert tokenizer.eos_token_id not in prompt.token_ids


def test_no_bos_where_the_tokenizer_adds_none() -> None:
    prompt = encode_prompt(EXAMPLE, section(template="plain"), ascii_tokenizer(adds="$A"))
    assert prompt.text == "What is 1+1?"


@pytest.mark.parametrize(
    ("opening", "prefill"),
    [
        ("[assistant]", ""),
        ("[assistant]<think>\\n", "<think>\n"),
        ("[assistant]<think>", "<think>"),
        ("[assistant]<think>\\n\\n</think>\\n\\n", "<think>\n\n</think>\n\n"),
    ],
)
@pytest.mark.parametrize("question", ["1+1?", "What does <think> mean?", "<think>"])
def test_prefill_is_what_the_generation_prompt_opens_and_never_the_question(
    opening: str, prefill: str, question: str
) -> None:
    tokenizer = ascii_tokenizer(TURNS.replace("[assistant]", opening))
    prompt = encode_prompt(Example(0, question, ""), section(), tokenizer)
    assert prompt.prefill == prefill
    assert prompt.question == question


def test_prefill_of_a_template_that_always_opens_the_answer() -> None:
    always = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '[assistant]<think>\\n' }}"
    assert encode_prompt(EXAMPLE, section(), ascii_tokenizer(always)).prefill == "<think>\n"


def test_r1_zero_is_the_published_template() -> None:
    prompt = encode_prompt(EXAMPLE, section(template="r1_zero"), ascii_tokenizer(adds="$A"))
    assert prompt.text == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        "process here </think> <answer> answer here </answer>. User: What is 1+1? Assistant:"
    )
    assert prompt.prefill == ""
    braces = Example(0, r"Simplify \frac{prompt}{stop}", "")
    text = encode_prompt(braces, section(template="r1_zero"), ascii_tokenizer(adds="$A")).text
    assert text.endswith(r"User: Simplify \frac{prompt}{stop}. Assistant:")


def test_system_prompt_prefix_and_suffix() -> None:
    settings = {"prompt_prefix": "Question: ", "prompt_suffix": " Think."}
    prompt = encode_prompt(
        EXAMPLE, section(system_prompt="Be brief.", **settings), ascii_tokenizer(TURNS)
    )
    assert prompt.text == "[system]Be brief.[user]Question: What is 1+1? Think.[assistant]"
    assert (prompt.id, prompt.question, prompt.answer, prompt.domain) == (
        (7, "What is 1+1?", "2", "maths")
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "r1-zero"}, "did you mean 'r1_zero'"),
        ({"template": "plain", "system_prompt": "x"}, "cannot hold it"),
        ({"template": "chat"}, "the tokenizer has no chat template"),
    ],
)
def test_template_mistakes(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompt(EXAMPLE, section(**settings), load_tokenizer("characters:running_total"))


TWICE = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"

DOUBLED = (
    "{% set s = namespace(x='x') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (TWICE.replace("BODY", "x"), "longer than 0.2 s for one conversation; mend .* chat_templ"),
        (TWICE.replace("BODY", "{% set a = 1 %}"), "longer than 0.2 s"),
        ("{{ 3 ** (10 ** 8) }}", "longer than 0.2 s"),
        ("{{ 'x' * 10 ** 10 }}", "more memory than 64 MiB for one conversation; mend"),
        ("{{ 'x'.center(10 ** 10) }}", "more memory than 64 MiB"),
        (DOUBLED, "more memory than 64 MiB|longer than 0.2 s"),
        ("{% for i in range(99999) %}" + "x" * 99 + "{% endfor %}", "9899901 char.* 1000120 are"),
        ("{{ 1 / 0 }}", "refuses the messages: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: .*recursion"),
    ],
)
def test_a_template_without_end_is_refused(
    chat_template: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1jax.data.chat_template._RENDER_SECONDS", 0.2)
    monkeypatch.setattr("r1jax.data.chat_template._RENDER_BYTES", 64 << 20)

    def limits() -> tuple[object, ...]:
        timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
        return (*timer, resource.getrlimit(resource.RLIMIT_AS))

    before = limits()
    with pytest.raises(SettingError, match=message) as error:
        encode_prompt(EXAMPLE, section(), ascii_tokenizer(chat_template))
    assert error.value.key == "template"
    assert limits() == before


# --- The user's turn between two attempts ---------------------------------------------------------

CLOSED = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]<think>\n' }}{% endif %}"
)
TEXT = "There might be an error. Once more"


@pytest.mark.parametrize(
    ("template", "text", "prefill"),
    [
        ("plain", TEXT, ""),
        ("r1_zero", f" User: {TEXT}. Assistant:", ""),
        ("chat", f"\n[user]{TEXT}<eos>\n[assistant]<think>\n", "<think>\n"),
    ],
)
def test_it_is_the_next_turn_of_the_template(template: str, text: str, prefill: str) -> None:
    tokenizer = ascii_tokenizer(CLOSED)
    made = encode_instruction(TEXT, section(template=template), tokenizer, (1,))
    assert (made.text, made.prefill, made.end_text) == (text, prefill, "<eos>")
    # No special token is added: what an attempt ended with stands before it already.
    assert tokenizer.decode(list(made.token_ids)) == text
    assert tokenizer.decode(list(made.end_ids)) == "<eos>"
    assert made.longest == len(made.token_ids) + 1


def test_it_stands_behind_an_attempt_as_the_chat_template_puts_it() -> None:
    tokenizer = ascii_tokenizer(CLOSED)
    made = encode_instruction(TEXT, section(template="chat"), tokenizer, (1,))
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": TEXT},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole == f"[user]1+1?<eos>\n[assistant]It is 3.{made.end_text}{made.text}"


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (CLOSED.replace("{% for m in messages %}", "{% for m in messages[-1:] %}"), "leaves out"),
        (CLOSED.replace("in messages %}", "in messages[:2] %}"), "leaves out what the user says"),
    ],
)
def test_a_template_that_drops_it_is_refused(chat_template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_instruction(TEXT, section(template="chat"), ascii_tokenizer(chat_template), (1,))
