"""Settings of objectives; needs neither JAX nor pydantic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

Normalisation = Literal["sequence_mean", "token_mean", "sequence_sum", "constant"]


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of the objective; each field names its source.

    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high]. The R1 paper
        uses 10 for R1 and does not report it for R1-Zero; 0.2 is PPO's. Apart: DAPO, 2503.14476.
    dual_clip: for negative advantages the term is at least dual_clip * A (1912.09729); None: off.
    kl_coefficient: beta of the k3 penalty to the reference (R1: 0.001); 0 needs no reference.
    normalisation: `sequence_mean` 1/N sum_i 1/|o_i| sum_t (DeepSeekMath), `token_mean`
        sum / tokens (DAPO), `sequence_sum` sum / N (RLOO), `constant` sum / (N * constant_length)
        (Dr. GRPO, 2503.20783).
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
        _check_clips(self)
        _check_shared(self)


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What every kind has.

    normalisation: how tokens are weighed: `sequence_mean` 1/N sum_i 1/|o_i| sum_t, `token_mean`
        sum / tokens, `sequence_sum` sum / N, `constant` sum / (N * constant_length). Default: that
        of the kind's paper.
    constant_length: tokens; of normalisation `constant`. Default in a stage: its max_new_tokens.
    kl_coefficient: beta of the penalty on KL to the reference; 0 needs no reference.
    kl_estimator: of each token: k1, k2 or k3 (Schulman). In the loss k2 has KL's gradient on
        policy, k3 its first-order approximation (2510.01555); k1 has none, unless kl_weighted.
    kl_in: `loss`; or `reward`, subtracted from the advantages of a token and those before it in its
        sample, where k1 has KL's gradient.
    kl_weighted: weigh the penalty in the loss by pi / pi_old, so that its gradient is that of KL
        off policy, too, for each estimator (DeepSeek-V3.2, 2512.02556, equation 7).
    entropy_coefficient: of a bonus on the mean entropy of the policy at trained tokens.
    importance_cap: for the gap between the sampler and the trainer: a token's term is weighted by
        min(pi_old / pi_sampler, cap). null: off.
    importance_correction: `truncated`, or `masked`: the weight is pi_old / pi_sampler where that is
        in [importance_floor, importance_cap], and 0 elsewhere (IcePop, 2510.18855).
    importance_floor: of `masked`; IcePop uses 0.5, with a cap of 5.
    importance_level: the weight of a `token`, or of its `sequence`: the product over its tokens.
    """

    # Read by pydantic where this is a section of a config.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: str
    normalisation: Normalisation = "sequence_mean"
    constant_length: int | None = None
    kl_coefficient: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_weighted: bool = False
    entropy_coefficient: float = 0.0
    importance_cap: float | None = 2.0
    importance_correction: Literal["truncated", "masked"] = "truncated"
    importance_floor: float = 0.0
    importance_level: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        _check_shared(self)
        if self.kl_in == "reward" and self.kl_weighted:
            raise ValueError("kl_weighted = true belongs to kl_in 'loss': leave it out")
        if (self.kl_in, self.kl_estimator, self.kl_weighted) == ("loss", "k1", False):
            raise ValueError(
                "kl_estimator = 'k1' in the loss penalises nothing, as the mean of its gradient is "
                "0 (arXiv 2510.01555); set kl_weighted = true or kl_in = 'reward', or choose k2"
            )
        _check_clips(self)


@dataclass(frozen=True, kw_only=True)
class GRPO(_Shared):
    """Group-relative policy optimization (DeepSeekMath, 2402.03300).

    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high].
    dual_clip: for negative advantages the term is at least dual_clip * A (1912.09729); null: off.
    advantage_scale: `std`: divide a group's centred rewards by their std; or `none`.
    """

    kind: Literal["grpo"] = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    advantage_scale: Literal["std", "none"] = "std"
    kl_coefficient: float = 0.001


@dataclass(frozen=True, kw_only=True)
class DrGRPO(_Shared):
    """GRPO without its two biases: no std, no length of the sample (2503.20783).

    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high].
    """

    kind: Literal["dr_grpo"] = "dr_grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    normalisation: Normalisation = "constant"


@dataclass(frozen=True, kw_only=True)
class DAPO(_Shared):
    """A higher upper bound, the mean over tokens, no KL (2503.14476). Its dynamic sampling and
    overlong reward are settings of the stage and a reward.

    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high].
    dual_clip: for negative advantages the term is at least dual_clip * A (1912.09729); null: off.
    advantage_scale: `std`: divide a group's centred rewards by their std; or `none`.
    """

    kind: Literal["dapo"] = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    advantage_scale: Literal["std", "none"] = "std"
    normalisation: Normalisation = "token_mean"


@dataclass(frozen=True, kw_only=True)
class GSPO(_Shared):
    """The ratio of a sequence, by its length, and its clip (2507.18071).

    form: `sequence`, or `token`: each token has its gradient, clipped by the sequence's ratio.
    clip_low, clip_high: epsilon of the interval [1 - clip_low, 1 + clip_high] of a sequence's
        ratio.
    advantage_scale: `std`: divide a group's centred rewards by their std; or `none`.
    """

    kind: Literal["gspo"] = "gspo"
    form: Literal["sequence", "token"] = "sequence"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    advantage_scale: Literal["std", "none"] = "std"


@dataclass(frozen=True, kw_only=True)
class CISPO(_Shared):
    """The weight of a token's gradient is bounded, none is left out (MiniMax-M1, 2506.13585).

    clip_low, clip_high: the weight is in [1 - clip_low, 1 + clip_high]. The paper has no lower
        bound, as here, and does not report the upper one; ScaleRL (2510.13786) uses 4 to 8.
    advantage_scale: `std`: divide a group's centred rewards by their std; or `none`.
    """

    kind: Literal["cispo"] = "cispo"
    clip_low: float = 1.0
    clip_high: float = 4.0
    advantage_scale: Literal["std", "none"] = "std"
    normalisation: Normalisation = "token_mean"


@dataclass(frozen=True, kw_only=True)
class SAPO(_Shared):
    """A soft gate in place of a clip (2511.20347).

    temperature_positive, temperature_negative: how fast the gradient fades away from a ratio of 1,
        where the advantage is positive, or is not.
    advantage_scale: `std`: divide a group's centred rewards by their std; or `none`.
    """

    kind: Literal["sapo"] = "sapo"
    temperature_positive: float = 1.0
    temperature_negative: float = 1.05
    advantage_scale: Literal["std", "none"] = "std"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature_positive", "temperature_negative"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be positive")


@dataclass(frozen=True, kw_only=True)
class GMPO(_Shared):
    """The geometric mean of a sequence's ratios (2507.20673).

    clip_low, clip_high: a token's ratio is bounded by [e^-clip_low, e^clip_high].
    advantage_scale: `std`: divide a group's centred rewards by their std; or `none`.
    """

    kind: Literal["gmpo"] = "gmpo"
    clip_low: float = 0.4
    clip_high: float = 0.4
    advantage_scale: Literal["std", "none"] = "std"


@dataclass(frozen=True, kw_only=True)
class RLOO(_Shared):
    """REINFORCE, with the mean of a group's other samples as the baseline (2402.14740)."""

    kind: Literal["rloo"] = "rloo"
    normalisation: Normalisation = "sequence_sum"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["loss", "reward"] = "reward"


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(_Shared):
    """Advantages that are normalised over all tokens of a phase, and PPO's clip (2501.03262).

    baseline: first subtract a group's mean reward (REINFORCE++ with baseline).
    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high].
    """

    kind: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    baseline: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["loss", "reward"] = "reward"


@dataclass(frozen=True, kw_only=True)
class PPO(_Shared):
    """PPO's clip, with advantages of a critic (1707.06347; GAE, 1506.02438).

    clip_low, clip_high: epsilon of the ratio's interval [1 - clip_low, 1 + clip_high].
    dual_clip: for negative advantages the term is at least dual_clip * A (1912.09729); null: off.
    gae_lambda: 1: an advantage is the return less the critic's value, without bias; below 1 the
        values of later tokens stand for a part of it. The R1 paper compares 0.95 and 1.
    discount: gamma, of a reward for each token that it is ahead.
    value_clip: the critic's new value counts as no further from the old one than this, where that
        makes its loss larger (2005.12729); null: off. 0.5 is verl's.
    whiten: normalise the advantages over all tokens of a phase, as verl, OpenRLHF and TRL do.
    """

    kind: Literal["ppo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    gae_lambda: float = 1.0
    discount: float = 1.0
    value_clip: float | None = 0.5
    whiten: bool = True
    normalisation: Normalisation = "token_mean"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_in: Literal["loss", "reward"] = "reward"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gae_lambda", "discount"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be in 0..1")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"value_clip = {self.value_clip}: must be positive, or null for off")


@dataclass(frozen=True, kw_only=True)
class OutsideObjective:
    """An objective of yours, `kind: my_package.objectives:mine`.

    options: what the function is called with, by name; it returns an `Objective`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: str
    options: dict[str, object] = field(default_factory=dict)


ObjectiveSettings = (
    GRPO | DrGRPO | DAPO | GSPO | CISPO | SAPO | GMPO | RLOO | ReinforcePlusPlus | PPO
)
"""Settings of the objectives by name."""


def _check_not_negative(settings: object, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} = {getattr(settings, name)}: must not be negative")


def _check_clips(settings: object) -> None:
    """Checks those of the clip's settings that an objective has."""
    names = ("clip_low", "clip_high")
    _check_not_negative(settings, *(name for name in names if hasattr(settings, name)))
    factor = getattr(settings, "dual_clip", None)
    if factor is not None and factor <= 1:
        raise ValueError(f"dual_clip = {factor}: must be above 1, or null for off")


def _check_shared(settings: GRPOConfig | _Shared) -> None:
    cap, floor = settings.importance_cap, settings.importance_floor
    masked = settings.importance_correction == "masked"
    _check_not_negative(settings, "kl_coefficient")
    if cap is not None and cap <= 0:
        raise ValueError(f"importance_cap = {cap}: must be positive, or null")
    if masked and cap is None:
        raise ValueError(
            "importance_correction = 'masked' with importance_cap = None: set the cap above "
            "which a token is left out"
        )
    if floor and not masked:
        raise ValueError(f"importance_floor = {floor} belongs to importance_correction 'masked'")
    if not 0 <= floor < (cap or float("inf")):
        raise ValueError(
            f"importance_floor = {floor}: must be at least 0 and below importance_cap = {cap}"
        )
    length = settings.constant_length
    constant = settings.normalisation == "constant"
    # A stage sets what an objective of `_Shared` lacks.
    lacking = constant and length is None and not isinstance(settings, _Shared)
    if lacking or (length is not None and not constant):
        raise ValueError(
            f"normalisation = {settings.normalisation!r} with constant_length = {length}: "
            "constant_length belongs to normalisation 'constant'"
        )
    if length is not None and length < 1:
        raise ValueError(f"constant_length = {length}: must be at least 1")
