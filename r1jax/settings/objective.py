"""Settings of the GRPO objective; needs neither JAX nor pydantic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Normalisation = Literal["sequence_mean", "token_mean", "constant"]


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of the objective; each field names its source.

    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high]. The R1 paper
        uses 10 for R1 and does not report it for R1-Zero; 0.2 is PPO's. Apart: DAPO, 2503.14476.
    dual_clip: for negative advantages the term is at least dual_clip * A (1912.09729); None: off.
    kl_coefficient: beta of the k3 penalty to the reference (R1: 0.001); 0 needs no reference.
    normalisation: `sequence_mean` 1/N sum_i 1/|o_i| sum_t (DeepSeekMath), `token_mean`
        sum / tokens (DAPO), `constant` sum / (N * constant_length) (Dr. GRPO, 2503.20783).
    constant_length: tokens; needed by `constant`.
    advantage_scale: `std` (GRPO) or `none` (Dr. GRPO).
    importance_cap: truncated importance sampling for the gap between the sampler and the trainer:
        each token's term is weighted by min(pi_old / pi_sampler, cap). None: off.
    importance_correction: `truncated`, or `masked`: the weight is pi_old / pi_sampler where that is
        in [importance_floor, importance_cap], and 0 elsewhere (IcePop, 2510.18855).
    importance_floor: of `masked`; IcePop uses 0.5, with a cap of 5.
    """

    # Read by pydantic where this is a section of a config.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coefficient: float = 0.001
    normalisation: Normalisation = "sequence_mean"
    constant_length: int | None = None
    advantage_scale: Literal["std", "none"] = "std"
    importance_cap: float | None = 2.0
    importance_correction: Literal["truncated", "masked"] = "truncated"
    importance_floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "kl_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip = {self.dual_clip}: must be above 1, or null for off")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"importance_cap = {self.importance_cap}: must be positive, or null")
        if self.importance_correction == "masked" and self.importance_cap is None:
            raise ValueError(
                "importance_correction = 'masked' with importance_cap = None: set the cap above "
                "which a token is left out"
            )
        if self.importance_floor and self.importance_correction != "masked":
            raise ValueError(
                f"importance_floor = {self.importance_floor} belongs to importance_correction "
                "'masked'"
            )
        if not 0 <= self.importance_floor < (self.importance_cap or float("inf")):
            raise ValueError(
                f"importance_floor = {self.importance_floor}: must be at least 0 and below "
                f"importance_cap = {self.importance_cap}"
            )
        if (self.normalisation == "constant") != (self.constant_length is not None):
            raise ValueError(
                f"normalisation = {self.normalisation!r} with constant_length = "
                f"{self.constant_length}: constant_length belongs to normalisation 'constant'"
            )
        if self.constant_length is not None and self.constant_length < 1:
            raise ValueError(f"constant_length = {self.constant_length}: must be at least 1")
