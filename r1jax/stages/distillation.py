"""The teacher of a stage that distils: checked before compute, and put into the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypedDict

from r1jax.models import Decoder, Teacher
from r1jax.models.parameters import Params
from r1jax.objectives.distillation import Comparison, Divergence
from r1jax.programs import Planning
from r1jax.run.resolve import ResolvedRun
from r1jax.settings.distillation import DistillationSection
from r1jax.settings.stage import TrainStage
from r1jax.stages.grpo.settings import GRPOStage
from r1jax.stages.sft.settings import SFTStage

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_SHOWN = 3  # tokens that a message names


def section_of(stage: TrainStage) -> DistillationSection | None:
    """The stage's section, of a kind that distils."""
    return stage.distillation if isinstance(stage, GRPOStage | SFTStage) else None


def check_teacher(stage: TrainStage, run: ResolvedRun) -> None:
    """Raises ConfigError where the teacher's tokens are not the student's, or fewer than top_k."""
    if (section := section_of(stage)) is None:
        return
    models = [run.models.of(name) for name in (stage.name, section.teacher)]
    place = "stages", stage.name, "distillation"
    sizes = [model.decoder.config.vocab_size for model in models]
    student, teacher = (model.tokenizer.get_vocab() for model in models)
    if student != teacher:
        unlike = {token for token, _ in student.items() ^ teacher.items()}
        shown = [
            f"{token!r} ({student.get(token, 'none')} and {teacher.get(token, 'none')})"
            for token in sorted(unlike)[:_SHOWN]
        ]
        raise run.config.refusal(
            (*place, "teacher"),
            f"its tokens are not the student's: of {len(student)} of the student "
            f"(vocab_size = {sizes[0]}) and {len(teacher)} of the teacher (vocab_size = "
            f"{sizes[1]}) {len(unlike)} have another id, or are not in both, such as "
            f"{', '.join(shown)}. Name a teacher with the student's tokenizer, or learn from its "
            "samples (kinds rejection_sampling and sft)",
        )
    if section.top_k is not None and section.top_k > min(sizes):
        raise run.config.refusal(
            (*place, "top_k"), f"there are {min(sizes)} tokens; lower it, or leave it out"
        )


def teacher_decoder(stage: TrainStage, run: ResolvedRun | Planning) -> Decoder | None:
    """What the stage's teacher computes; None: it has none."""
    if (section := section_of(stage)) is None:
        return None
    name = section.teacher
    return run.decoder_of(name) if isinstance(run, Planning) else run.models.of(name).decoder


def make_teacher(stage: TrainStage, model: Decoder | None) -> Callable[[Params], Teacher] | None:
    """The teacher of its weights; None: the stage has none."""
    if (section := section_of(stage)) is None or model is None:
        return None
    beta = 0.5 if section.beta is None else section.beta
    divergence = Divergence(section.divergence, beta, section.top_k)
    return lambda params: Teacher(params, model, divergence, section.temperature)


class DistillationTerms(TypedDict, total=False):
    """Fields of `PolicyOutputs`."""

    token_loss: Float[Array, "batch time"]
    token_metrics: Mapping[str, Float[Array, "batch time"]]


def distillation_terms(comparison: Comparison, coefficient: float) -> DistillationTerms:
    """The divergence as a term of each token's loss, and what is shown."""
    return {
        "token_loss": coefficient * comparison.divergence,
        "token_metrics": {DIVERGENCE: comparison.divergence, AGREEMENT: comparison.agrees},
    }


DIVERGENCE, AGREEMENT = "distillation/divergence", "distillation/agreement"
"""Metrics, means over trained tokens: nats, and the share whose likeliest token is the same."""
