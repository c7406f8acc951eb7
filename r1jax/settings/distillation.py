"""Settings of distillation: what a stage's model learns of a teacher's distribution."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r1jax.settings.section import Section
from r1jax.settings.stage import TEACHER, WeightsUse

DivergenceKind = Literal["reverse_kl", "forward_kl", "jsd"]


class DistillationSection(Section):
    """The divergence to a frozen teacher, at each trained token, is part of the loss."""

    teacher: str = Field(
        description="Whose distribution is learned: an earlier train stage, `model`, or a name in "
        "`models`, of the same tokens. Its weights are split and kept as that model says."
    )
    coefficient: float = Field(1.0, gt=0, description="Of the divergence, in the loss.")
    divergence: DivergenceKind = Field(
        "reverse_kl",
        description="Of student p and teacher q: reverse_kl sum p log(p / q); forward_kl sum q "
        "log(q / p); jsd, between the two (GKD).",
    )
    beta: float | None = Field(
        None, gt=0, lt=1, description="The teacher's part in jsd's mixture. Default: 0.5."
    )
    top_k: int | None = Field(
        None,
        ge=1,
        description="Tell the teacher's K likeliest tokens apart, and count the others as one. "
        "Default: the whole vocabulary.",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="Divides both models' logits in the divergence. Default: that of sampling; 1 "
        "in sft.",
    )

    @model_validator(mode="after")
    def _beta_is_of_jsd(self) -> DistillationSection:
        if self.beta is not None and self.divergence != "jsd":
            raise ValueError(
                f"beta = {self.beta:g} belongs to divergence 'jsd', and it is {self.divergence!r}; "
                "leave it out"
            )
        return self

    def weights_use(self) -> WeightsUse:
        return WeightsUse("distillation.teacher", self.teacher, TEACHER)


class OnPolicyDistillation(DistillationSection):
    """Distillation at the student's samples: beside rewards, or alone with `rewards: []`."""

    form: Literal["loss", "advantage"] = Field(
        "loss",
        description="loss: the divergence over the vocabulary, with its gradient. advantage: "
        "-coefficient log(p / q) of each sampled token, added to its advantage: an estimate of "
        "reverse_kl's gradient.",
    )

    @model_validator(mode="after")
    def _sampled(self) -> OnPolicyDistillation:
        if self.form == "loss":
            return self
        for key, default in (("divergence", "reverse_kl"), ("top_k", None), ("temperature", None)):
            if getattr(self, key) != default:
                raise ValueError(
                    f"{key} = {getattr(self, key)} with form 'advantage', which estimates "
                    "reverse_kl by the sampled token, at the temperature of sampling; leave it "
                    "out, or set form to 'loss'"
                )
        return self


class LogitDistillation(DistillationSection):
    """Distillation at a dataset's tokens: alone, or beside cross-entropy."""

    cross_entropy_coefficient: float = Field(
        0.0, ge=0, description="Of the dataset's tokens' cross-entropy, in the loss; 0: none."
    )
