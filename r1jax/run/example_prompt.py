"""A prompt with which the model that a run left can be tried."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from r1jax.data.example import Example
from r1jax.data.prompts import encode_prompt
from r1jax.run.resolve import ResolvedRun
from r1jax.settings.data import DataSection
from r1jax.settings.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 60  # of a prompt that fits into a command
_ROWS = 100  # of a dataset that are looked at
_COMMON = "What is 12 plus 7?"


def example_prompt(run: ResolvedRun) -> tuple[str, str] | None:
    """A template of `r1jax sample`, and a prompt that the run's tokenizer can encode with it.

    It is a short prompt of the run's data, of the last stage that has one, or else a common one.
    None: the tokenizer can encode neither.
    """
    tokenizer = _tokenizer(run)
    for template, prompt in _candidates(run):
        if _encodes(prompt, template, tokenizer):
            return template, prompt
    return None


def reads_questions(run: ResolvedRun) -> bool:
    """Whether the run's tokenizer can encode a question in words, as those of a benchmark are."""
    return _encodes(_COMMON, "plain", _tokenizer(run))


def _tokenizer(run: ResolvedRun) -> PreTrainedTokenizerBase:
    """That of the last model that the run has trained, or reads."""
    stages = run.config.stages
    trained = [stage.name for stage in stages if stage.DESCRIPTION.leaves == "weights"]
    return run.models.of(trained[-1] if trained else stages[-1].name).tokenizer


def _candidates(run: ResolvedRun) -> Iterator[tuple[str, str]]:
    """Of each dataset a short prompt, the last stage's first; and then a common one."""
    template = None
    for stage in reversed(run.config.stages):
        for data in _datasets(stage, run):
            section = run.config.data[data]
            template = template or section.template
            examples = islice(run.datasets.examples(data), _ROWS)
            prompts = (_prompt(each, section) for each in examples if not each.history)
            short = (each for each in prompts if 0 < len(each) <= _CHARACTERS)
            if prompt := next((each for each in short if each.isprintable()), None):
                yield section.template, prompt
    yield template or "chat", _COMMON


def _datasets(stage: Stage, run: ResolvedRun) -> list[str]:
    """The datasets of a stage whose rows are examples that no stage of the run has written."""
    named = stage.prompt_datasets() or stage.example_datasets()
    parts = [part for data in named for part in run.datasets.parts(data)]
    return [part for part in parts if not run.config.source_stages(part)]


def _prompt(example: Example, section: DataSection) -> str:
    """What `r1jax sample` is given for the prompt that a stage makes of an example."""
    if section.template != "plain":
        return example.prompt
    return f"{section.prompt_prefix}{example.prompt}{section.prompt_suffix}"


def _encodes(prompt: str, template: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    section = DataSection(source="jsonl:-", template=template)
    try:
        return len(encode_prompt(Example(0, prompt, ""), section, tokenizer).token_ids) > 0
    except ValueError:  # no chat template, or no tokens for these characters
        return False
