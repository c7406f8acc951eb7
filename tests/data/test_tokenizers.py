"""Character tokenizers are real ones, and BOS and EOS are found where they are declared."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r1jax.data import tokenizers
from r1jax.data.tasks.running_total import RunningTotal
from r1jax.data.tokenizers import (
    EOS,
    PAD,
    TAGS,
    begins_with_bos,
    encode_texts,
    load_tokenizer,
    stop_token_ids,
    tokenizer_fingerprint,
)
from r1jax.models import ModelConfig, declare
from r1jax.models.parameters import is_spec
from r1jax.weights.hugging_face import export

TEXT = "12+7-3=<think>12+7=19 19-3=16</think><answer>16</answer>"
TOKENS = (PAD, EOS, *TAGS, *RunningTotal.alphabet)  # in the order of their ids
FAMILIES = ("qwen2", "qwen3", "llama")

# The printable symbols that stand for bytes in byte-level vocabularies, as GPT-2 chose them:
# printable Latin-1 for itself, the other bytes in order from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
SYMBOLS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)
}


@pytest.fixture(scope="module")
def characters():
    return load_tokenizer("characters:running_total")


@pytest.fixture(scope="module")
def exported(characters, tmp_path_factory):
    """Directories of models with the demo's tokenizer, one per family."""
    directories, random = {}, np.random.default_rng(0)
    for family in FAMILIES:
        config = ModelConfig(
            architecture=family,
            vocab_size=len(characters),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )
        params = jax.tree.map(
            lambda spec: jnp.asarray(random.standard_normal(spec.shape, np.float32)),
            declare(config),
            is_leaf=is_spec,
        )
        directories[family] = tmp_path_factory.mktemp("exported") / family
        export(directories[family], params, config, tokenizer=characters)
    return directories


def byte_level(
    without: Set[int] = frozenset(),
    *,
    unknown: str | None = None,
    tokens: Sequence[str] = (),
    normalizer: normalizers.Normalizer | None = None,
    use_regex: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows all bytes but some, `<think>`, and the merge of 1 and 2."""
    symbols = [SYMBOLS[byte] for byte in range(256) if byte not in without]
    merges = [] if without & {*b"12"} else [("1", "2")]
    known = [*symbols, *("".join(merge) for merge in merges), *tokens]
    vocabulary = {token: i for i, token in enumerate(known)}
    core = Tokenizer(models.BPE(vocabulary, merges=merges, unk_token=unknown))
    if normalizer is not None:
        core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_one_token_per_character_and_per_tag(characters) -> None:
    (ids,) = encode_texts([TEXT], characters)
    tags = sum(TEXT.count(tag) for tag in TAGS)
    assert len(ids) == len(TEXT) - sum(len(tag) * TEXT.count(tag) for tag in TAGS) + tags
    assert len(characters) == len(RunningTotal.alphabet) + len(TAGS) + 2
    # Tags must survive the decoding that rewards read, EOS must not.
    ended = [*ids, characters.eos_token_id]
    assert characters.decode(ended, skip_special_tokens=True) == TEXT
    assert characters.decode(ended) == TEXT + "<eos>"


def test_saved_and_loaded_by_transformers_with_identical_ids(characters, tmp_path: Path) -> None:
    characters.save_pretrained(str(tmp_path))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [RunningTotal().example(i, "train").text or "" for i in range(200)]
    texts += ["<pad><eos>", " 1  2 ", "<think>", ""]
    assert loaded(texts)["input_ids"] == characters(texts)["input_ids"]
    for ids in loaded(texts)["input_ids"]:
        assert loaded.decode(ids) == characters.decode(ids)
    assert loaded.get_vocab() == characters.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(characters)
    # And through this package's own loader, which must not bring back a BOS or an unknown token.
    ours = load_tokenizer(str(tmp_path))
    assert encode_texts(texts, ours) == encode_texts(texts, characters)
    assert not begins_with_bos(ours) and ours.unk_token_id is None


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_an_exported_tokenizer_as_it_is(characters, exported, family) -> None:
    """For Qwen2, AutoTokenizer puts that family's normalizer and pre-tokenizer in their place."""
    theirs = AutoTokenizer.from_pretrained(exported[family])
    ours = load_tokenizer(str(exported[family]))
    # A token more than that, such as Qwen2's own unknown token, would have no embedding.
    assert theirs.get_vocab() == ours.get_vocab() == characters.get_vocab()
    for loaded in (theirs, ours):
        assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)
        assert loaded.unk_token_id is None and not begins_with_bos(loaded)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, len(TOKENS) - 1) | st.just(TOKENS.index(" ")), max_size=60))
    def check(ids: list[int]) -> None:
        text = "".join(TOKENS[i] for i in ids)
        visible = "".join(TOKENS[i] for i in ids if i > 1)
        for tokenizer in (characters, theirs, ours):
            assert tokenizer(text)["input_ids"] == ids
            assert encode_texts(["1", text], tokenizer) == [[TOKENS.index("1")], ids]
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(ids, skip_special_tokens=True) == visible

    check()


def test_an_exported_tokenizer_survives_being_exported_again(exported, tmp_path: Path) -> None:
    """A stage that starts from an earlier run's directory passes its tokenizer on."""
    load_tokenizer(str(exported["qwen2"])).save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text((exported["qwen2"] / "config.json").read_text())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        theirs(" ".join(TOKENS))["input_ids"]
        == [i for token in range(len(TOKENS)) for i in (token, TOKENS.index(" "))][:-1]
    )
    assert len(theirs) == len(TOKENS)


def test_a_qwen2_directory_keeps_its_own_tokenizer(tmp_path: Path) -> None:
    """AutoTokenizer puts Qwen2's pre-tokenizer in its place, which cuts between digits."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (merged,) = encode_texts(["12"], tokenizer)
    assert len(merged) == 1
    assert encode_texts(["12"], load_tokenizer(str(tmp_path))) == [merged]


def test_so_does_one_named_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student of another family is given its teacher's tokenizer by name, without its weights."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "org/model"
        files = [path.name for path in tmp_path.iterdir()]
        assert set(files) == set(filter_repo_objects(files, allow_patterns=allow_patterns))
        assert not list(filter_repo_objects(["model.safetensors"], allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_tokenizer("org/model")
    assert encode_texts(["12"], loaded) == encode_texts(["12"], tokenizer)


def test_a_foreign_character_is_an_error_that_names_it(characters) -> None:
    with pytest.raises(ValueError, match=r"'1\+x='.*no token for 'x'"):
        encode_texts(["1+1=", "1+x="], characters)


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "b": 1}, unk_token=""),
        models.Unigram([("a", -1.0), ("b", -1.0)], unk_id=None),
    ],
)
def test_so_it_is_where_the_tokenizer_itself_fails(model) -> None:
    """Other models than BPE raise what is not a ValueError."""
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert encode_texts(["a", "b"], tokenizer) == [[0], [1]]
    with pytest.raises(ValueError, match=r"cannot encode 'x': it has no token for 'x' \(.+\)\."):
        encode_texts(["a", "x"], tokenizer)


@pytest.mark.parametrize("load", [load_tokenizer, AutoTokenizer.from_pretrained])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("1 x", "x"),
        ("é", "é"),
        ("1加2", "加"),
        ("1\n\n2", "\n\n"),
        ("1<2", "<"),
        ("<think>1<think", "<hiknt"),
        ("\u01201", "\u0120"),  # the symbol of a space is no space
        ("<|endoftext|>", "<>defnotx|"),
    ],
)
def test_an_exported_tokenizer_refuses_it_too(exported, load, family, text, foreign) -> None:
    tokenizer = load(str(exported[family]))
    named = "".join(sorted(set(foreign)))
    with pytest.raises(ValueError, match=re.escape(f"cannot encode {text!r}: it has no token for")):
        encode_texts([TEXT, text], tokenizer)
    with pytest.raises(ValueError, match=re.escape(f"no token for {named!r}. Use another")):
        encode_texts([TEXT, text], tokenizer)


@settings(max_examples=200, deadline=None)
@given(
    without=st.sets(st.sampled_from([*"12x \nñé加".encode()]), max_size=4),
    words=st.lists(st.sampled_from([*"12xt \nñé加😀", "<think>", "<"]), max_size=12),
    use_regex=st.booleans(),
)
def test_no_character_is_ever_dropped_silently(without, words, use_regex) -> None:
    """Of any byte-level BPE: what it encodes it decodes to the same text."""
    tokenizer = byte_level(without, use_regex=use_regex)
    text = "".join(words)
    lost = {c for part in text.split("<think>") for c in part if without & {*c.encode()}}
    if lost:
        named = repr("".join(sorted(lost)))
        with pytest.raises(ValueError, match=re.escape(f"it has no token for {named}.")):
            encode_texts([text], tokenizer)
    else:
        (ids,) = encode_texts([text], tokenizer)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_normalizer_decides_what_needs_a_token() -> None:
    lower = byte_level({*b"X"}, normalizer=normalizers.Lowercase())
    assert lower.decode(encode_texts(["Xx"], lower)[0]) == "xx"
    # Composed, "e\u0301" is "é" (C3 A9): neither "e" nor the accent (CC 81) needs a token.
    composed = byte_level({0xCC, 0x81}, normalizer=normalizers.NFC())
    assert composed.decode(encode_texts(["e\u0301"], composed)[0]) == "é"
    composed = byte_level({0xA9}, normalizer=normalizers.NFC())
    with pytest.raises(ValueError, match="no token for 'e\u0301'"):
        encode_texts(["e\u0301"], composed)


def test_bytes_may_be_the_normalizers_work() -> None:
    core = Tokenizer(models.BPE({"a": 0, SYMBOLS[0xC3]: 1, SYMBOLS[0xA9]: 2}, merges=[]))
    core.normalizer = normalizers.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert encode_texts(["aé"], tokenizer) == [[0, 1, 2]]
    with pytest.raises(ValueError, match="no token for 'ã'"):  # C3 A3
        encode_texts(["aã"], tokenizer)


def test_an_unknown_token_is_no_silent_loss() -> None:
    tokenizer = byte_level({*b"x"}, tokens=["<unk>"], unknown="<unk>")
    unknown = tokenizer.get_vocab()["<unk>"]
    assert encode_texts(["axa"], tokenizer)[0][1] == unknown
    # One that the vocabulary lacks is an error of the tokenizer's own, and only where it is needed.
    tokenizer = byte_level({*b"x"}, unknown="<unk>")
    assert tokenizer.decode(encode_texts(["aa"], tokenizer)[0]) == "aa"
    with pytest.raises(ValueError, match="no token for 'x'"):
        encode_texts(["axa"], tokenizer)


def test_a_bpe_of_other_symbols_than_bytes_is_taken_as_it_is() -> None:
    """There "a" has a token within a word and none at its end, where nothing is lost here."""
    core = Tokenizer(models.BPE({"a": 0, "b</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    assert encode_texts(["ab b"], PreTrainedTokenizerFast(tokenizer_object=core)) == [[0, 1, 1]]


def test_the_vocabulary_is_searched_once_per_tokenizer() -> None:
    tokenizers._symbols_without_token.cache_clear()
    for tokenizer in (whole := byte_level(), partial := byte_level({*b"x"}), whole, partial):
        encode_texts(["1", "2"], tokenizer)
        encode_texts(["3"], tokenizer)
    assert tokenizers._symbols_without_token.cache_info().misses == 2


@pytest.mark.parametrize(
    ("alphabet", "message"),
    [
        ("0110", "alphabet '0110' has a character twice"),
        ("01é加", "alphabet '01é加': 'é加' would be several tokens per character"),
    ],
)
def test_an_alphabet_that_cannot_be_one_token_per_character(alphabet, message, monkeypatch) -> None:
    monkeypatch.setattr(tokenizers, "TASKS", {"new": SimpleNamespace(alphabet=alphabet)})
    with pytest.raises(ValueError, match=message):
        load_tokenizer("characters:new")


def test_all_of_ascii_is_an_alphabet(monkeypatch) -> None:
    """Control characters, spaces and the tags' own characters included."""
    alphabet = "".join(map(chr, range(127, -1, -1)))
    monkeypatch.setattr(tokenizers, "TASKS", {"new": SimpleNamespace(alphabet=alphabet)})
    tokenizer = load_tokenizer("characters:new")
    text = alphabet + "<think" + alphabet[::-1]
    (ids,) = encode_texts([text], tokenizer)
    assert ids == [6 + alphabet.index(character) for character in text]
    assert tokenizer.decode(ids) == text


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task 'runing_total'; known: bilingual, running"):
        load_tokenizer("characters:runing_total")
    with pytest.raises(ValueError, match="it has none of tokenizer.json, vocab.json"):
        load_tokenizer(str(tmp_path))


def test_bos_that_only_the_configuration_declares(characters, tmp_path: Path) -> None:
    """DeepSeek-R1's files: `add_bos_token: true`, and a tokenizer.json that adds none."""
    characters.save_pretrained(str(tmp_path))
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": "<pad>"}
    path.write_text(json.dumps(config))
    assert not begins_with_bos(load_tokenizer(str(tmp_path)))
    path.write_text(json.dumps(config | {"add_bos_token": True}))
    declared = load_tokenizer(str(tmp_path))
    assert begins_with_bos(declared)
    assert declared("1+")["input_ids"] == [0, *encode_texts(["1+"], declared)[0]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (1,)),
        ({}, (1,)),
        ({"eos_token_id": None}, (1,)),
        ({"eos_token_id": 1}, (1,)),
        ({"eos_token_id": 7}, (7, 1)),
        ({"eos_token_id": [5, 1, 7]}, (5, 1, 7)),
    ],
)
def test_every_eos_id_stops(characters, config, expected) -> None:
    assert stop_token_ids(characters, config) == expected


def test_no_eos_at_all_is_an_error() -> None:
    tokenizer = load_tokenizer("characters:running_total")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        stop_token_ids(tokenizer, {"eos_token_id": None})


def test_importing_the_package_imports_neither_jax_nor_transformers_nor_tfds() -> None:
    code = (
        "import sys, r1jax.data; "
        "heavy = {'jax', 'jaxlib', 'transformers', 'tensorflow_datasets', 'torch'}; "
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_advises_to_install_pytorch() -> None:
    """In an environment without PyTorch, which r1jax does not need."""
    code = (
        "import importlib.util, sys\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: (\n"
        "    None if name.partition('.')[0] == 'torch' else find_spec(name, *rest)\n"
        ")\n"
        "sys.modules['torch'] = None\n"
        "import r1jax.recipe\n"
        "from r1jax.data.tokenizers import load_tokenizer\n"
        "load_tokenizer('characters:running_total')\n"
        "import transformers\n"
        "print(transformers.is_torch_available())\n"
    )
    environment = {k: v for k, v in os.environ.items() if "ADVISORY" not in k}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "False\n" and "PyTorch" not in done.stderr
