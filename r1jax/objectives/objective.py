"""An objective as a value: pure functions and numbers, which `make_policy_step` puts into a step.

`token_terms` is the whole loss of a token. The named objectives below are compositions of functions
of this package; one of yours is another `Objective`, or `dataclasses.replace` of one of these:

    objective = replace(grpo(), surrogate=lambda ratio, tokens: ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from r1jax.objectives.advantages import (
    Advantages,
    group_advantages,
    leave_one_out_advantages,
    rewards_as_advantages,
)
from r1jax.objectives.corrections import (
    importance_weight,
    masked_importance_weight,
    masked_sequence_importance_weight,
    sequence_importance_weight,
)
from r1jax.objectives.kl import divergence, weighted_divergence
from r1jax.objectives.policy_loss import (
    Surrogate,
    cispo_surrogate,
    clipped_surrogate,
    dual_clip,
    geometric_mean_surrogate,
    reinforce_surrogate,
    sapo_surrogate,
)
from r1jax.objectives.ratios import log_ratio, sequence_log_ratio, sequence_token_log_ratio
from r1jax.objectives.shapes import PER_TOKEN, check_advantages, check_alike, check_log_probs
from r1jax.settings.objective import (
    CISPO,
    DAPO,
    GMPO,
    GRPO,
    GSPO,
    PPO,
    RLOO,
    SAPO,
    DrGRPO,
    GRPOConfig,
    Normalisation,
    ObjectiveSettings,
    ReinforcePlusPlus,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from r1jax.objectives.kl import Estimator
    from r1jax.objectives.sequences import Mask, SegmentIds

    Tokens = Float[Array, "batch time"]


class PolicyTokens(NamedTuple):
    """What an objective's functions read of a micro-batch; outside of `mask` anything finite.

    log_probs: of the policy that is trained; of these and of the entropy gradients are taken.
    old_log_probs: of the policy that sampled, as the trainer computes them. None: it is the same.
    sampler_log_probs: of what was really sampled from. segment_ids: as of `sequence_sum`.
    kl_coefficients: of the penalty in the loss, at each token. None: the objective's.
    """

    log_probs: Tokens
    advantages: Float[Array, " batch"] | Tokens
    mask: Mask
    old_log_probs: Tokens | None = None
    reference_log_probs: Tokens | None = None
    sampler_log_probs: Tokens | None = None
    entropy: Tokens | None = None
    segment_ids: SegmentIds | None = None
    kl_coefficients: Tokens | None = None

    @property
    def old(self) -> Tokens:
        """log pi_old, without gradient."""
        return jax.lax.stop_gradient(
            self.log_probs if self.old_log_probs is None else self.old_log_probs
        )


class Ratio(NamedTuple):
    """r of each token, and log r."""

    values: Tokens
    logs: Tokens


AdvantageFn = Callable[[jax.Array], Advantages]
LogRatioFn = Callable[[PolicyTokens], jax.Array]
SurrogateFn = Callable[[Ratio, PolicyTokens], Surrogate]
CorrectionFn = Callable[[PolicyTokens], jax.Array]


@dataclass(frozen=True)
class Penalty:
    """coefficient * KL to the reference policy (see `r1jax.objectives.kl`).

    in_reward: it is subtracted from the advantages (`penalise_advantages`), before the step. Else
    it is added to the loss; weighted: by pi / pi_old.
    """

    coefficient: float
    estimator: Estimator = "k3"
    in_reward: bool = False
    weighted: bool = False


@dataclass(frozen=True)
class CriticTerms:
    """How a critic's values become advantages, and what the critic learns: the returns.

    discount, decay: gamma and lambda of `generalised_advantages`. value_clip: of `value_loss`.
    whitened: the advantages are normalised over all tokens of a phase (`whiten_advantages`).
    """

    discount: float = 1.0
    decay: float = 1.0
    value_clip: float | None = 0.5
    whitened: bool = True


def _token_log_ratio(tokens: PolicyTokens) -> jax.Array:
    return log_ratio(tokens.log_probs, tokens.old_log_probs)


@dataclass(frozen=True)
class Objective:
    """The loss of a policy, and what it needs.

    name: in messages.
    advantages: of rewards [prompts, samples]. None: they come from elsewhere, such as a critic.
    log_ratio: log(pi / pi_old) of each token, or of its sequence; the surrogate is given it.
    surrogate: what is maximised at each token.
    correction: a weight for each token's term; None: 1.
    penalty: on KL to the reference; None: none.
    entropy_coefficient: of the bonus on the policy's entropy.
    normalisation, constant_length: the reduction, as of `token_weights`.
    whitened: advantages are normalised over all tokens of a phase (`whiten_advantages`).
    needs: names of `GRPOBatch`'s fields, or `entropy`, without which a batch is refused.
        `segment_ids` are needed only where rows hold several sequences.
    critic: advantages are those of a critic's values; None: there is no critic.
    by_step: the tokens of a sample may have different advantages, and `advantages`, if there is
        such a function, may be given the rewards of all steps of a prompt's samples in its row.
    """

    name: str
    surrogate: SurrogateFn
    advantages: AdvantageFn | None = group_advantages
    log_ratio: LogRatioFn = _token_log_ratio
    correction: CorrectionFn | None = None
    penalty: Penalty | None = None
    entropy_coefficient: float = 0.0
    normalisation: Normalisation = "sequence_mean"
    constant_length: int | None = None
    whitened: bool = False
    needs: tuple[str, ...] = ()
    critic: CriticTerms | None = None
    by_step: bool = False

    @property
    def changes_token_advantages(self) -> bool:
        """Whether `batch_advantages` must be called before the step, as KL is in the reward or
        advantages are whitened."""
        return self.whitened or (self.penalty is not None and self.penalty.in_reward)


class TokenTerms(NamedTuple):
    """Of each token; `loss` is what is differentiated, the rest is shown. kl: the k3 estimate."""

    loss: Tokens
    ratio: Tokens
    clipped: Tokens
    kl: Tokens


def token_terms(objective: Objective, tokens: PolicyTokens) -> TokenTerms:
    """-w surrogate(r, A) + beta KL - c H: for GRPO the R1 paper's equation 1 (arXiv 2501.12948).

    Raises:
      ValueError: arrays of other shapes, or the penalty's or the bonus's is missing.
    """
    _check(tokens)
    penalty = objective.penalty
    logs = objective.log_ratio(tokens)
    ratio = Ratio(jnp.exp(logs), logs)
    surrogate = objective.surrogate(ratio, tokens)
    value = surrogate.objective
    if objective.correction is not None and tokens.sampler_log_probs is not None:
        value = value * objective.correction(tokens)
    loss, kl = -value, jnp.zeros_like(value)
    if penalty is not None:
        if tokens.reference_log_probs is None:
            raise ValueError(
                f"kl_coefficient = {penalty.coefficient} needs reference_log_probs; "
                "pass them or set kl_coefficient to 0"
            )
        pair = tokens.log_probs, tokens.reference_log_probs
        kl = divergence(*pair, "k3")
        if not penalty.in_reward:
            added = kl if penalty.estimator == "k3" else divergence(*pair, penalty.estimator)
            if penalty.weighted:
                token_ratio = jnp.exp(_token_log_ratio(tokens))
                added = weighted_divergence(token_ratio, *pair, penalty.estimator)
            coefficients = tokens.kl_coefficients
            loss = loss + (penalty.coefficient if coefficients is None else coefficients) * added
    if objective.entropy_coefficient:
        if tokens.entropy is None:
            raise ValueError(
                f"entropy_coefficient = {objective.entropy_coefficient} needs entropy: return it "
                "from log_prob_fn as PolicyOutputs(log_probs, entropy), with its gradient"
            )
        loss = loss - objective.entropy_coefficient * tokens.entropy
    return TokenTerms(loss, ratio.values, surrogate.clipped.astype(jnp.float32), kl)


def _check(tokens: PolicyTokens) -> None:
    check_log_probs(
        {
            "log_probs": tokens.log_probs,
            "old_log_probs": tokens.old_log_probs,
            "reference_log_probs": tokens.reference_log_probs,
            "sampler_log_probs": tokens.sampler_log_probs,
        }
    )
    check_advantages(tokens.advantages, "log_probs", tokens.log_probs)
    rest = {
        "mask": tokens.mask,
        "entropy": tokens.entropy,
        "segment_ids": tokens.segment_ids,
        "kl_coefficients": tokens.kl_coefficients,
    }
    check_alike(PER_TOKEN, {"log_probs": tokens.log_probs, **rest})


# --- By name -------------------------------------------------------------------------------------


def grpo(settings: GRPO | None = None) -> Objective:
    """min(r A, clip(r) A), the group's mean and std, a k3 penalty (DeepSeekMath, arXiv 2402.03300,
    equation 3; R1, arXiv 2501.12948, equation 1)."""
    settings = settings or GRPO()
    return _named(settings, _clipped(settings, settings.dual_clip), _grouped(settings))


def grpo_of_config(config: GRPOConfig) -> Objective:
    """`grpo`, but a batch without sampler log-probs is not corrected, in place of refused."""
    settings = GRPO(**asdict(config))
    # A correction is made where there is something to correct by; `token_terms` names a reference
    # that is missing, once it is known that all arrays fit together.
    return replace(grpo(settings), needs=())


def dr_grpo(settings: DrGRPO | None = None) -> Objective:
    """GRPO without std, and with a constant in place of the sample's length (arXiv 2503.20783,
    section 3.2)."""
    settings = settings or DrGRPO()
    return _named(settings, _clipped(settings), partial(group_advantages, scale="none"))


def dapo(settings: DAPO | None = None) -> Objective:
    """GRPO with two bounds and the mean over tokens (arXiv 2503.14476, equation 8)."""
    settings = settings or DAPO()
    return _named(settings, _clipped(settings, settings.dual_clip), _grouped(settings))


def gspo(settings: GSPO | None = None) -> Objective:
    """min(s A, clip(s) A) with a sequence's ratio s (arXiv 2507.18071, equation 5), or the form by
    tokens (equation 13)."""
    settings = settings or GSPO()
    function = sequence_log_ratio if settings.form == "sequence" else sequence_token_log_ratio

    def of_sequence(tokens: PolicyTokens) -> jax.Array:
        return function(tokens.log_probs, tokens.old_log_probs, tokens.mask, tokens.segment_ids)

    objective = _named(settings, _clipped(settings), _grouped(settings), of_sequence)
    return replace(objective, by_step=settings.form == "token")


def cispo(settings: CISPO | None = None) -> Objective:
    """sg[clip(r)] A log pi, the mean over tokens (MiniMax-M1, arXiv 2506.13585, equation 4)."""
    settings = settings or CISPO()
    low, high = settings.clip_low, settings.clip_high

    def surrogate(ratio: Ratio, tokens: PolicyTokens) -> Surrogate:
        return cispo_surrogate(
            ratio.values, tokens.log_probs, tokens.advantages, clip_low=low, clip_high=high
        )

    return _named(settings, surrogate, _grouped(settings))


def sapo(settings: SAPO | None = None) -> Objective:
    """4 / tau sigmoid(tau (r - 1)) A (arXiv 2511.20347, equation 5)."""
    settings = settings or SAPO()
    positive, negative = settings.temperature_positive, settings.temperature_negative

    def surrogate(ratio: Ratio, tokens: PolicyTokens) -> Surrogate:
        return sapo_surrogate(
            ratio.values,
            tokens.advantages,
            temperature_positive=positive,
            temperature_negative=negative,
        )

    return _named(settings, surrogate, _grouped(settings))


def gmpo(settings: GMPO | None = None) -> Objective:
    """A times the geometric mean of a sequence's bounded ratios (arXiv 2507.20673, equation 4)."""
    settings = settings or GMPO()
    low, high = settings.clip_low, settings.clip_high

    def surrogate(ratio: Ratio, tokens: PolicyTokens) -> Surrogate:
        of_sequence = tokens.mask, tokens.segment_ids
        return geometric_mean_surrogate(
            ratio.logs, tokens.advantages, *of_sequence, clip_low=low, clip_high=high
        )

    objective = _named(settings, surrogate, _grouped(settings))
    return replace(objective, needs=(*objective.needs, "segment_ids"))


def rloo(settings: RLOO | None = None) -> Objective:
    """A log pi, summed over a sequence, with the mean of the others as the baseline (arXiv
    2402.14740, section 3.2)."""
    settings = settings or RLOO()

    def surrogate(ratio: Ratio, tokens: PolicyTokens) -> Surrogate:
        return reinforce_surrogate(ratio.values, tokens.log_probs, tokens.advantages)

    return _named(settings, surrogate, leave_one_out_advantages)


def reinforce_plus_plus(settings: ReinforcePlusPlus | None = None) -> Objective:
    """min(r A, clip(r) A), with advantages that are normalised over all tokens of a phase; with
    `baseline`, of a group's centred rewards (arXiv 2501.03262, equations 8 to 10)."""
    settings = settings or ReinforcePlusPlus()
    centred = partial(group_advantages, scale="none")
    advantages = centred if settings.baseline else rewards_as_advantages
    return _named(settings, _clipped(settings), advantages, whitened=True)


def ppo(settings: PPO | None = None) -> Objective:
    """min(r A, clip(r) A) (arXiv 1707.06347, equation 7), with advantages of a critic."""
    settings = settings or PPO()
    objective = _named(settings, _clipped(settings, settings.dual_clip), None)
    critic = CriticTerms(
        settings.discount, settings.gae_lambda, settings.value_clip, settings.whiten
    )
    return replace(objective, critic=critic)


def _grouped(
    settings: GRPO | DAPO | GSPO | CISPO | SAPO | GMPO,
) -> AdvantageFn:
    return partial(group_advantages, scale=settings.advantage_scale)


def _clipped(
    settings: GRPO | DrGRPO | DAPO | GSPO | ReinforcePlusPlus | PPO, factor: float | None = None
) -> SurrogateFn:
    """The clipped surrogate; with a factor, dual clip."""
    low, high = settings.clip_low, settings.clip_high

    def surrogate(ratio: Ratio, tokens: PolicyTokens) -> Surrogate:
        clipped = clipped_surrogate(ratio.values, tokens.advantages, clip_low=low, clip_high=high)
        return clipped if factor is None else dual_clip(clipped, tokens.advantages, factor)

    return surrogate


def _correction(settings: ObjectiveSettings, cap: float) -> CorrectionFn:
    masked = settings.importance_correction == "masked"
    floor = settings.importance_floor

    def of_token(tokens: PolicyTokens) -> jax.Array:
        assert tokens.sampler_log_probs is not None
        pair = tokens.old, tokens.sampler_log_probs
        if masked:
            return masked_importance_weight(*pair, floor=floor, cap=cap)
        return importance_weight(*pair, cap)

    def of_sequence(tokens: PolicyTokens) -> jax.Array:
        assert tokens.sampler_log_probs is not None
        arrays = tokens.old, tokens.sampler_log_probs, tokens.mask, tokens.segment_ids
        if masked:
            return masked_sequence_importance_weight(*arrays, floor=floor, cap=cap)
        return sequence_importance_weight(*arrays, cap=cap)

    return of_token if settings.importance_level == "token" else of_sequence


def _named(
    settings: ObjectiveSettings,
    surrogate: SurrogateFn,
    advantages: AdvantageFn | None,
    ratio: LogRatioFn = _token_log_ratio,
    *,
    whitened: bool = False,
) -> Objective:
    """An objective with what all kinds have: correction, penalty, bonus, reduction, and needs."""
    cap, penalty, needs = settings.importance_cap, None, []
    by_sequence = ratio is not _token_log_ratio
    if settings.kl_coefficient:
        in_reward = settings.kl_in == "reward"
        penalty = Penalty(
            settings.kl_coefficient, settings.kl_estimator, in_reward, settings.kl_weighted
        )
        needs = ["reference_log_probs", *(["old_log_probs"] if in_reward else [])]
        by_sequence |= in_reward
    if cap is not None:
        needs.append("sampler_log_probs")
        by_sequence |= settings.importance_level == "sequence"
    if settings.entropy_coefficient:
        needs.append("entropy")
    return Objective(
        settings.kind,
        surrogate,
        advantages,
        ratio,
        None if cap is None else _correction(settings, cap),
        penalty,
        settings.entropy_coefficient,
        settings.normalisation,
        settings.constant_length,
        whitened,
        (*needs, *(["segment_ids"] if by_sequence else [])),
        by_step=settings.kind not in _ONE_ADVANTAGE,
    )


# Their formulas have one advantage for a sample: the others' mean, or a product over its tokens.
_ONE_ADVANTAGE = ("rloo", "gmpo")


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that a kind's settings describe."""
    return NAMED[settings.kind](settings)


NAMED: dict[str, Callable[..., Objective]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "ppo": ppo,
}
"""Kind -> the objective of its settings."""
