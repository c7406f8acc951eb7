"""Tokenizers: any Hugging Face one, or one token per character of a task's alphabet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1jax.data.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS = "characters:"
PAD, EOS = "<pad>", "<eos>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a directory, a hub name, or `characters:NAME`.

    Raises:
        ValueError: there is no task NAME, or nothing can be loaded from the directory or hub.
    """
    if name_or_path.startswith(CHARACTERS):
        name = name_or_path.removeprefix(CHARACTERS)
        if name not in TASKS:
            raise ValueError(
                f"tokenizer {name_or_path!r}: no task {name!r}; known: {', '.join(sorted(TASKS))}"
            )
        return _character_tokenizer(TASKS[name].alphabet)
    # Imported here because transformers takes seconds, and this package must stay light.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path = Path(name_or_path).expanduser()
    source = str(path) if path.is_dir() else name_or_path
    try:
        if path.is_dir() and (path / "tokenizer.json").is_file():
            # The file is the tokenizer. AutoTokenizer of transformers 5 instead rebuilds the
            # pre-tokenizer of the model's family beside it: a Qwen2 directory with any other
            # tokenizer (DeepSeek-R1's distills, our demo) would get other ids, silently.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source)
        declared = get_tokenizer_config(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name_or_path!r}: neither a directory with tokenizer files nor a hub name "
            f"that can be reached ({str(error).splitlines()[0]})"
        ) from error
    if declared.get("add_bos_token") and not begins_with_bos(tokenizer):
        # transformers 5 drops this flag when there is a tokenizer.json. DeepSeek-R1's has no step
        # that adds BOS, yet its models never saw a text without one.
        tokenizer.add_bos_token = True
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Writes the files that `AutoTokenizer.from_pretrained` reads."""
    tokenizer.save_pretrained(str(directory))


def _character_tokenizer(alphabet: str) -> PreTrainedTokenizerBase:
    """One token per character, one per tag; ids: pad, eos, tags, then the alphabet in order."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet {alphabet!r} has a character twice")
    vocabulary = {token: i for i, token in enumerate((PAD, EOS, *TAGS, *alphabet))}
    # No unknown token on purpose: a character outside the alphabet is an error where it is
    # encoded (`encode_texts`), not a hole that the model learns to live with.
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([PAD, EOS])
    # The tags are ordinary tokens: a special token would vanish from decoded completions, and
    # with it what the format reward looks for.
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each text exactly as it stands: no special token is added.

    Raises:
        ValueError: the tokenizer has no token for a part of a text; names that text.
    """
    if not texts:
        return []
    try:
        return _encode(texts, tokenizer)
    except Exception as batch_error:  # The Rust side raises bare Exception.
        for text in texts:
            try:
                _encode([text], tokenizer)
            except Exception as error:
                single = {character for character in text if character in tokenizer.get_vocab()}
                foreign = sorted(set(text) - single)
                raise ValueError(
                    f"the tokenizer cannot encode {text[:80]!r}: {error}; it has no token for "
                    f"{''.join(foreign)[:40]!r}. Use another tokenizer or template."
                ) from error
        raise ValueError(
            f"the tokenizer failed on a batch of texts: {batch_error}"
        ) from batch_error


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # A long text is no error here: whoever encodes it decides what too long means.
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text that is encoded with special tokens."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's, then the tokenizer's own EOS.

    Raises:
        ValueError: neither names one; a completion could then never end.
    """
    declared = (generation_config or {}).get("eos_token_id")
    ids = list(declared) if isinstance(declared, (list, tuple)) else [declared]
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
