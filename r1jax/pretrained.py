"""A pretrained model in a few lines: open it on a mesh, sample it, take log-probs of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data.example import Example
from r1jax.data.padded_rows import bucket
from r1jax.data.prompts import encode_prompt
from r1jax.models import Decoder, right_padded, token_log_probs
from r1jax.models.parameters import Params
from r1jax.rollouts.sampling import decode, generate_options, pad_prompts, sample_prompts
from r1jax.run.checkpointed import find_model
from r1jax.run.models import LanguageModel
from r1jax.sampler import Finish, generate_chunks
from r1jax.settings.data import DataSection
from r1jax.settings.model import ModelSection
from r1jax.settings.sampling import SamplingSection
from r1jax.settings.section import SettingError
from r1jax.sharding import make_layout
from r1jax.weights import hugging_face

if TYPE_CHECKING:
    from jaxtyping import Array, Float
    from transformers import PreTrainedTokenizerBase


_log_probs = jax.jit(token_log_probs, static_argnames="model")


@dataclass(frozen=True)
class PretrainedModel:
    """A model with its weights on a mesh, as `load_model` opens it."""

    params: Params
    language_model: LanguageModel

    @property
    def decoder(self) -> Decoder:
        """What the functions of `r1jax.models` and `r1jax.sampler` take beside the weights."""
        return self.language_model.decoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.language_model.tokenizer


def load_model(
    path: str,
    mesh: Mapping[str, int] | None = None,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> PretrainedModel:
    """Open a Hugging Face checkpoint, each device reading only its part.

    Args:
      path: a directory, `gs://...`, a name on the hub, a run's directory, or RUN_DIR@STEP.
      mesh: axis -> size, one of which may be -1, such as `{"fsdp": -1, "tensor": 4}`; default: all
        devices along `fsdp`.
      dtype: of the weights and of what is computed with them. In bfloat16, log-probs differ from
        transformers' in float32 by up to some hundredths; `"float32"` takes twice the memory.

    Raises:
      ValueError: no such checkpoint, a model that is not supported, or a mesh that does not divide
        it; the message says what would.
    """
    path = find_model(path).path
    layout = make_layout(dict(mesh or {"fsdp": -1}))
    section = ModelSection(path=path, param_dtype=dtype, compute_dtype=dtype)
    model = LanguageModel.resolve(section, layout)
    return PretrainedModel(model.load(hugging_face.resolve(path)), model)


def sample(
    model: PretrainedModel,
    prompts: Sequence[str],
    sampling: SamplingSection | None = None,
    *,
    samples: int = 1,
    max_new_tokens: int = 256,
    template: str = "chat",
    seed: int = 0,
) -> list[list[str]]:
    """Completions of each prompt, as text.

    Args:
      sampling: temperature, top-p, stop strings, ...; default: temperature 1.
      samples: completions of each prompt.
      template: `chat` (the tokenizer's), `r1_zero` (the paper's) or `plain`.
      seed: with a prompt's index and a sample's it determines each completion.

    Raises:
      ValueError: there is no prompt, one is empty or too long for the model, or the tokenizer has
        no chat template.
    """
    if not prompts:
        raise ValueError("prompts is empty: give one text or more")
    language_model = model.language_model
    data = DataSection(source="jsonl:-", template=template)
    encoded = [
        encode_prompt(Example(id=i, prompt=text, answer=""), data, language_model.tokenizer)
        for i, text in enumerate(prompts)
    ]
    longest = max(len(prompt.token_ids) for prompt in encoded)
    _check_positions(longest, max_new_tokens, model.decoder)
    options = generate_options(
        language_model,
        sampling or SamplingSection(),
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    rounds = sample_prompts(model.params, encoded, language_model, options, batch=len(encoded))
    completions = dict(each for ended in rounds for each in ended)
    texts = [completions[i].text for i in range(len(completions))]
    return [texts[start : start + samples] for start in range(0, len(texts), samples)]


def log_probs(
    model: PretrainedModel, tokens: Sequence[Sequence[int]], *, temperature: float = 1.0
) -> Float[Array, "batch time"]:
    """The log-prob of each token given those before it, under softmax(logits / temperature).

    Args:
      tokens: token ids of each text; they may differ in length.

    Returns:
      Entry t is of token t. The first token, about which the model says nothing, and the padding
      behind a shorter text are 0.
    """
    lengths = [len(text) for text in tokens]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"tokens have lengths {lengths}: give at least one text, none of them empty"
        )
    shards = model.decoder.layout.shards("batch")
    rows, time = -(-len(tokens) // shards) * shards, bucket(max(lengths))
    ids = np.zeros((rows, time), np.int32)
    for row, text in zip(ids, tokens, strict=False):
        row[: len(text)] = text
    filled = lengths + [0] * (rows - len(tokens))
    padded = right_padded(jnp.asarray(ids), jnp.asarray(filled, jnp.int32))
    results = _log_probs(model.params, padded, model=model.decoder, temperature=temperature)
    return results.log_probs[: len(tokens), : max(lengths)]


def _check_positions(prompt_tokens: int, max_new_tokens: int, decoder: Decoder) -> None:
    """Raises SettingError when the prompt and its completion have more tokens than positions."""
    positions = decoder.config.max_position_embeddings
    left = positions - prompt_tokens
    if max_new_tokens > left:
        remedy = f"lower max_new_tokens to {left}" if left > 0 else "shorten the prompt"
        raise SettingError(
            "max_new_tokens",
            f"a prompt of {prompt_tokens} tokens and {max_new_tokens} new ones: the model has "
            f"max_position_embeddings = {positions}; {remedy}",
        )


_MAX_NEW_TOKENS = 1024
_UNFINISHED = "�"  # decoding ends inside a character: wait for the rest of its bytes


def stream_completions(
    model_path: str,
    prompt_text: str,
    sampling: SamplingSection,
    samples: int,
    max_new_tokens: int | None,
    seed: int,
    template: str,
) -> Iterator[tuple[int, str]]:
    """Yield (sample index, new text) while the model writes.

    Args:
      model_path: a Hugging Face directory, a hub name, a run's directory (its last weights), or a
        checkpoint of it, RUN_DIR@STEP.
      max_new_tokens: None: 1024, or fewer where the model has no positions for them.
      template: `chat`, `r1_zero` or `plain`.

    Raises:
      ValueError: the prompt with max_new_tokens has more tokens than the model has positions.
    """
    directory = hugging_face.resolve(find_model(model_path).path)
    section = ModelSection(path=str(directory), multi_token_prediction=sampling.speculative)
    layout = make_layout({"data": 1, "fsdp": -1, "tensor": 1})
    model = LanguageModel.resolve(section, layout)
    data = DataSection(source="jsonl:-", template=template)
    prompt = encode_prompt(Example(id=0, prompt=prompt_text, answer=""), data, model.tokenizer)
    if max_new_tokens is None:
        left = model.decoder.config.max_position_embeddings - len(prompt.token_ids)
        max_new_tokens = max(1, min(_MAX_NEW_TOKENS, left))
    _check_positions(len(prompt.token_ids), max_new_tokens, model.decoder)
    options = generate_options(
        model, sampling, samples=samples, max_new_tokens=max_new_tokens, seed=seed
    )
    shown = [0] * samples
    chunks = generate_chunks(
        model.load(directory),
        pad_prompts([prompt], model.decoder),
        model.decoder,
        replace(options, sync_every=8),
    )
    texts = [""] * samples
    for _, state in chunks:
        tokens, lengths = np.asarray(state.tokens[0]), np.asarray(state.lengths[0])
        finish = np.asarray(state.finish[0])
        for index in range(samples):
            length = int(lengths[index]) - int(finish[index] == Finish.EOS)
            texts[index] = decode(model.tokenizer, tokens[index, :length])
            ready = texts[index].rstrip(_UNFINISHED)
            if len(ready) > shown[index]:
                yield index, ready[shown[index] :]
                shown[index] = len(ready)
    for index, text in enumerate(texts):
        if len(text) > shown[index]:
            yield index, text[shown[index] :]
