"""Completions of one prompt, as they are made."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from r1jax.data import Example, encode_prompt, load_tokenizer, stop_token_ids
from r1jax.evaluation.run_directory import language_models
from r1jax.rollouts.sampling import decode, pad_prompts, stop_search, to_sampling
from r1jax.run.context import build_decoder
from r1jax.sampler import Finish, GenerateOptions, generate_chunks
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
    model, generation = build_decoder(section, layout)
    tokenizer = load_tokenizer(str(directory))
    data = DataSection(source="jsonl:-", template=template)
    prompt = encode_prompt(Example(id=0, prompt=prompt_text, answer=""), data, tokenizer)
    params = hugging_face.load_params(directory, model.config, layout, model.execution.param_dtype)
    shown = [0] * samples
    chunks = generate_chunks(
        params,
        pad_prompts([prompt], model),
        model,
        GenerateOptions(
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
            sampling=to_sampling(sampling),
            eos_ids=stop_token_ids(tokenizer, generation),
            stop=stop_search(tokenizer, sampling),
            sync_every=8,
            speculative=sampling.speculative,
        ),
    )
    texts = [""] * samples
    for _, state in chunks:
        tokens, lengths = np.asarray(state.tokens[0]), np.asarray(state.lengths[0])
        finish = np.asarray(state.finish[0])
        for index in range(samples):
            length = int(lengths[index]) - int(finish[index] == Finish.EOS)
            texts[index] = decode(tokenizer, tokens[index, :length])
            ready = texts[index].rstrip(_UNFINISHED)
            if len(ready) > shown[index]:
                yield index, ready[shown[index] :]
                shown[index] = len(ready)
    for index, text in enumerate(texts):
        if len(text) > shown[index]:
            yield index, text[shown[index] :]
