"""Completions of one prompt, as they are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from r1jax.data import Example, encode_prompt
from r1jax.evaluation.run_directory import language_models
from r1jax.rollouts.sampling import decode, generate_options, pad_prompts
from r1jax.run.models import LanguageModel
from r1jax.sampler import Finish, generate_chunks
from r1jax.settings.data import DataSection
from r1jax.settings.model import ModelSection
from r1jax.settings.sampling import SamplingSection
from r1jax.sharding import make_layout
from r1jax.weights import hugging_face

_UNFINISHED = "�"  # decoding ends inside a character: wait for the rest of its bytes


def stream_completions(
    model_path: str,
    prompt_text: str,
    sampling: SamplingSection,
    samples: int,
    max_new_tokens: int,
    seed: int,
    template: str,
) -> Iterator[tuple[int, str]]:
    """Yield (sample index, new text) while the model writes.

    Args:
      model_path: a Hugging Face directory, a hub name, or a run's directory (its last weights).
      template: `chat`, `r1_zero` or `plain`.
    """
    trained = language_models(model_path)
    directory = trained[-1] if trained else hugging_face.resolve(model_path)
    section = ModelSection(path=str(directory), multi_token_prediction=sampling.speculative)
    layout = make_layout({"data": 1, "fsdp": -1, "tensor": 1})
    model = LanguageModel.resolve(section, layout)
    data = DataSection(source="jsonl:-", template=template)
    prompt = encode_prompt(Example(id=0, prompt=prompt_text, answer=""), data, model.tokenizer)
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
