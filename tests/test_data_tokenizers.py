"""Character tokenizers are real ones, and BOS and EOS are found where they are declared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from r1jax.data.tasks import RunningTotal
from r1jax.data.tokenizers import (
    TAGS,
    begins_with_bos,
    encode_texts,
    load_tokenizer,
    save_tokenizer,
    stop_token_ids,
    tokenizer_fingerprint,
)

TEXT = "12+7-3=<think>12+7=19 19-3=16</think><answer>16</answer>"


@pytest.fixture(scope="module")
def characters():
    return load_tokenizer("characters:running_total")


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
    save_tokenizer(characters, tmp_path)
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


def test_a_qwen2_directory_keeps_its_own_tokenizer(characters, tmp_path: Path) -> None:
    """transformers' AutoTokenizer puts Qwen2's pre-tokenizer in its place, and loses the spaces."""
    save_tokenizer(characters, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 20}))
    ours = load_tokenizer(str(tmp_path))
    assert encode_texts([TEXT], ours) == encode_texts([TEXT], characters)
    assert ours.decode(encode_texts([TEXT], ours)[0]) == TEXT
    assert len(ours) == len(characters)


def test_a_foreign_character_is_an_error_that_names_it(characters) -> None:
    with pytest.raises(ValueError, match=r"'1\+x='.*no token for 'x'"):
        encode_texts(["1+1=", "1+x="], characters)


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no task 'runing_total'; known: running_total"):
        load_tokenizer("characters:runing_total")
    with pytest.raises(ValueError, match="neither a directory with tokenizer files"):
        load_tokenizer(str(tmp_path))


def test_bos_that_only_the_configuration_declares(characters, tmp_path: Path) -> None:
    """DeepSeek-R1's files: `add_bos_token: true`, and a tokenizer.json that adds none."""
    save_tokenizer(characters, tmp_path)
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
