"""A compiled function of a stage, with abstract arguments; and what a kind is given to say it.

The functions are those that the loops call; here they only get arguments. Texts are as long as the
config lets them be: prompts of max_prompt_tokens, completions of max_new_tokens.

Left out is what runs once: making, loading and saving states. How often a GRPO stage evaluates, or
a model rewrites, depends on the data: their calls count as 0 in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jax.sharding import PartitionSpec
from jax.stages import Lowered

from r1jax.config.run_config import RunConfig
from r1jax.models import Decoder
from r1jax.sampler import to_sample
from r1jax.settings.stage import Stage
from r1jax.sharding import Layout

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from r1jax.programs.arrays import AbstractTree


class NotPlanned(Exception):
    """A program that cannot be lowered, because another one that it needs does not fit."""


@dataclass(frozen=True)
class Program:
    """One compiled function of a stage.

    mesh: axis -> size, of the layout that it runs over.
    lower: returns it, lowered for the mesh; may need others to be compiled first (`NotPlanned`).
    arguments: its arguments, by what they are: `weights`, `optimizer`, `cache`, `batch`, ...
    resident: what else is in memory at the time.
    calls: in a step of the stage; 0 where that depends on the data.
    makes: what its results are, where they are new.
    turns: of its data-dependent loop in a call (a loop that decodes token by token).
    larger_branch: whether conditionals take their larger branch: sampling does where it sorts the
        vocabulary.
    useful_flops: of the model in a call, on all devices together; recomputed products do not count.
    temporaries: bytes on a device of the largest arrays that it makes and frees, by what they are;
        an estimate, for those who do not compile.
    prepare: changes arbitrary arguments into some with which the program does its work.
    trial_turns: of that loop, with the arguments of `prepare`.
    """

    name: str
    mesh: Mapping[str, int]
    lower: Callable[[], Lowered]
    arguments: Mapping[str, AbstractTree]
    resident: Mapping[str, AbstractTree]
    calls: float
    makes: str = "outputs"
    turns: float = 1.0
    larger_branch: bool = True
    useful_flops: float = 0.0
    temporaries: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[PyTree], PyTree] = lambda arguments: arguments
    trial_turns: float = 1.0


@dataclass(frozen=True)
class StagePrograms:
    """What a stage calls in a step: an update, or for stages that only sample, a batch.

    tokens: sampled or trained on in a step. unit: what a step is.
    """

    programs: tuple[Program, ...]
    tokens: int
    unit: str = "step"


@dataclass(frozen=True)
class Planning:
    """What the `programs` of a kind needs beside the stage's settings.

    decoder_of: the decoder of a stage's weights, of a model by its name, or of a directory.
    rollout_layout: the devices, arranged for sampling.
    output_specs: how the results of a lowered program are laid out, which only its compiler can
        say; None where it does not fit. Default: nothing is compiled.
    """

    config: RunConfig
    decoder_of: Callable[[str], Decoder]
    rollout_layout: Layout
    output_specs: Callable[[Lowered], Sequence[PartitionSpec] | None] = lambda _: None

    def sampler_of(self, name: str) -> Decoder:
        """As `decoder_of`, arranged for sampling, its weights in the dtype that it computes in."""
        return to_sample(self.decoder_of(name), self.rollout_layout)


def longest_prompt(stage: Stage, config: RunConfig) -> int:
    """The tokens that a prompt of the stage may have."""
    sections = [config.data[name] for name in stage.prompt_datasets()]
    parts = [config.data[part] for section in sections for part in section.mixture]
    return max(section.max_prompt_tokens for section in sections + parts if not section.mixture)
