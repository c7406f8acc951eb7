"""Tokenizers: any Hugging Face one, or one token per character of a task's alphabet."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TYPE_CHECKING

from r1jax.bucket import download, locate, on_bucket
from r1jax.data.tasks import TASKS
from r1jax.files import JsonObject

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# transformers reads it when it is imported, which happens in this module alone: r1jax uses its
# tokenizers only, and needs no advice that PyTorch was not found.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

CHARACTERS = "characters:"
PAD, EOS = "<pad>", "<eos>"
# config.json names the model's family, which decides where there is no tokenizer.json.
_TOKENIZER_FILES = ["tokenizer*", "*.jinja", "vocab*", "merges.txt", "*tokens*.json", "config.json"]
# Any of which is a tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")
# What is read with a tokenizer.json.
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a directory (local or on a bucket), a hub name, or `characters:NAME`.

    Raises ValueError: there is no task NAME, or nothing can be loaded from the directory or hub.
    """
    if name_or_path.startswith(CHARACTERS):
        name = name_or_path.removeprefix(CHARACTERS)
        if name not in TASKS:
            raise ValueError(
                f"tokenizer {name_or_path!r}: no task {name!r}; known: {', '.join(sorted(TASKS))}"
            )
        return _character_tokenizer(TASKS[name].alphabet)
    # Imported here because it takes seconds, and not every user of this package needs it.
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path = locate(name_or_path).expanduser()
    with TemporaryDirectory(prefix="r1jax-") as scratch:
        try:
            if on_bucket(path):
                download(path, _TOKENIZER_FILES, Path(scratch))
                path = Path(scratch)
            elif not path.is_dir():
                path = Path(snapshot_download(name_or_path, allow_patterns=_TOKENIZER_FILES))
            source = str(path)
            if (path / "tokenizer.json").is_file():
                # The file is the tokenizer. AutoTokenizer of transformers 5 instead rebuilds the
                # pre-tokenizer of the model's family beside it: a Qwen2 directory with any other
                # tokenizer (DeepSeek-R1's distills) would get other ids, silently.
                tokenizer = _read_tokenizer(path / "tokenizer.json")
            else:
                if not any((path / name).is_file() for name in _VOCABULARIES):
                    raise ValueError(f"it has none of {', '.join(_VOCABULARIES)}")
                tokenizer = AutoTokenizer.from_pretrained(source)
            declared = get_tokenizer_config(source)
        except (OSError, ValueError) as error:
            if path.is_dir():
                raise ValueError(f"tokenizer {name_or_path!r}: {_first_line(error)}") from error
            raise ValueError(
                f"tokenizer {name_or_path!r}: neither a directory with tokenizer files nor a hub "
                f"name that can be reached ({_first_line(error)})"
            ) from error
    if declared.get("add_bos_token") and not begins_with_bos(tokenizer):
        # transformers 5 drops this flag when there is a tokenizer.json. DeepSeek-R1's has no step
        # that adds BOS, yet its models never saw a text without one.
        tokenizer.add_bos_token = True
    return tokenizer


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a `tokenizer.json` and the files beside it.

    Raises ValueError, which names the file that is broken.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, no mapping")
        with _without_panics():
            return PreTrainedTokenizerFast.from_pretrained(str(path.parent))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # The Rust side raises bare Exception, and its panics.
        raise ValueError(
            f"{_broken_file(path)} is broken: {_first_line(error)}; copy or download it again"
        ) from error


def _broken_file(path: Path) -> Path:
    """`path`, or the file beside it without which the tokenizer can be read."""
    from transformers import PreTrainedTokenizerFast

    present = [path.with_name(name) for name in _BESIDE if path.with_name(name).is_file()]
    for file in (path, *present):
        with TemporaryDirectory(prefix="r1jax-") as scratch:
            try:
                for each in {path, file}:
                    shutil.copy(each, scratch)
                with _without_panics():
                    PreTrainedTokenizerFast.from_pretrained(scratch)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:
                return file
    return path


@contextmanager
def _without_panics() -> Iterator[None]:
    """Keeps what is written to file descriptor 2 until the block ends, and drops it if that raises.

    A panic of the Rust side is printed there before it becomes an exception.
    """
    try:
        before = os.dup(2)
    except OSError:  # closed, and so there is no sys.stderr either
        yield
        return
    sys.stderr.flush()
    with TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
            sys.stderr.flush()
        finally:
            os.dup2(before, 2)
            os.close(before)
        kept.seek(0)
        os.write(2, kept.read())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _character_tokenizer(alphabet: str) -> PreTrainedTokenizerBase:
    """One token per character, one per tag; ids: pad, eos, tags, then the alphabet in order.

    A byte-level BPE without merges: AutoTokenizer of transformers 5 takes any Qwen2 directory for
    a byte-level BPE with Qwen2's pre-tokenizer. Wherever a pre-tokenizer cuts, the bytes between
    the cuts stay single tokens, so the ids are the same with every family's.

    Raises ValueError: a character occurs twice, or is not ASCII (and so more than one byte).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet {alphabet!r} has a character twice")
    if not alphabet.isascii():
        wide = "".join(character for character in alphabet if not character.isascii())
        raise ValueError(
            f"alphabet {alphabet!r}: {wide!r} would be several tokens per character, as its tokens "
            "are bytes; use ASCII characters"
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The vocabulary holds printable symbols of bytes: a space is "\u0120".
    symbols = [byte_level.pre_tokenize_str(character)[0][0] for character in alphabet]
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *TAGS, *symbols))}
    # No unknown token on purpose: a character outside the alphabet is an error where it is
    # encoded (`encode_texts`), not a silent loss.
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = byte_level
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, EOS])
    # The tags are ordinary tokens: a special token would vanish from decoded completions, and
    # with it what the format reward looks for.
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        # Explicit although it is the default: what the saved files lack gets the default of the
        # model's family, and Qwen2's is a token more than the model has.
        unk_token=None,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text exactly as it stands: no special token is added.

    Raises ValueError: the tokenizer has no token for a part of a text; names that text.
    """
    if not texts:
        return []
    try:
        encoded = _encode(texts, tokenizer)
    except Exception as batch_error:  # The Rust side raises bare Exception.
        for text in texts:
            try:
                _encode([text], tokenizer)
            except Exception as error:
                single = {character for character in text if character in tokenizer.get_vocab()}
                raise _no_token(text, set(text) - single, f" ({error})") from error
        raise ValueError(
            f"the tokenizer failed on a batch of texts: {batch_error}"
        ) from batch_error
    if symbols := _symbols_without_token(tokenizer):
        for text, encoding in zip(texts, encoded.encodings or (), strict=True):
            if dropped := _dropped(text, encoding, tokenizer.backend_tokenizer, symbols):
                raise _no_token(text, dropped)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # No warning about a long text: the caller decides what is too long.
        verbose=False,
    )


def _no_token(text: str, characters: set[str], detail: str = "") -> ValueError:
    return ValueError(
        f"the tokenizer cannot encode {text[:80]!r}: it has no token for "
        f"{''.join(sorted(characters))[:40]!r}{detail}. Use another tokenizer or template."
    )


@functools.lru_cache(maxsize=8)
def _symbols_without_token(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The byte symbols that a byte-level BPE drops silently, because it has no token for them.

    Empty for those of released models, which have all 256 bytes.
    """
    from tokenizers import models, pre_tokenizers

    core = getattr(tokenizer, "backend_tokenizer", None)
    # Other models, and a BPE that has an unknown token, drop nothing.
    if core is None or not isinstance(core.model, models.BPE) or core.model.unk_token is not None:
        return frozenset()
    probe = "加"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if not _symbols(probe, core).issuperset(byte_level.pre_tokenize_str(probe)[0][0]):
        return frozenset()
    model = core.model
    return frozenset(symbol for symbol in byte_level.alphabet() if not model.tokenize(symbol))


def _symbols(text: str, core: Tokenizer) -> set[str]:
    """The single characters that the tokenizer's model gets of `text`."""
    if core.normalizer is not None:
        text = core.normalizer.normalize_str(text)
    if core.pre_tokenizer is None:
        return set(text)
    return {symbol for piece, _ in core.pre_tokenizer.pre_tokenize_str(text) for symbol in piece}


def _dropped(
    text: str, encoding: Encoding, core: Tokenizer, without_token: frozenset[str]
) -> set[str]:
    """The characters of `text` that have a byte without a token.

    Those within an added token, such as the letters of `<think>`, need no token of their own.
    """
    added = core.get_added_tokens_decoder()
    parts, at = [], 0
    for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in added:
            parts.append(text[at:start])
            at = stop
    parts.append(text[at:])
    lossy = [part for part in parts if not without_token.isdisjoint(_symbols(part, core))]
    characters = {character for part in lossy for character in part}
    named = {c for c in characters if not without_token.isdisjoint(_symbols(c, core))}
    # A normalizer may join characters to one that is missing: then no single one is to blame.
    return named or characters


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text that is encoded with special tokens."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: JsonObject | None = None
) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's, then the tokenizer's own EOS.

    Raises ValueError: neither names one; a completion could then never end.
    """
    declared = (generation_config or {}).get("eos_token_id")
    ids = list(declared) if isinstance(declared, (list, tuple)) else [declared]
    for each in ids:
        if each is not None and not (type(each) is int and 0 <= each < 2**31):
            raise ValueError(
                f"generation_config.json: eos_token_id = {str(declared)[:80]}: needs the id of a "
                "token, or a list of ids"
            )
    ids.append(tokenizer.eos_token_id)
    stops = tuple(dict.fromkeys(int(i) for i in ids if i is not None))
    if not stops:
        raise ValueError(
            "no end-of-sequence token: set eos_token in the tokenizer or eos_token_id in "
            "generation_config.json"
        )
    return stops


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: equal when the same ids mean the same tokens."""
    entries = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return hashlib.blake2b(repr(entries).encode(), digest_size=16).hexdigest()
