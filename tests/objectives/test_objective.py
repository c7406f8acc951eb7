"""Each objective against its paper's formula in float64, by loops over sequences and tokens, and
its gradient against finite differences of that formula; in rows of one sequence and packed ones.

Where a paper stops a gradient, the formula reads `z`, the log-probs at the point of the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.normalisation import token_weights
from r1jax.objectives.objective import NAMED, PolicyTokens, grpo, make_objective, token_terms
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
    ReinforcePlusPlus,
)


class Sample(NamedTuple):
    """Log-probs of a sequence's trained tokens, float64, and its advantage."""

    old: np.ndarray
    reference: np.ndarray
    sampler: np.ndarray
    advantage: float


def samples() -> tuple[list[np.ndarray], list[Sample]]:
    """Log-probs of the policy, and the rest: ratios from 0.4 to 2.5, advantages of both signs."""
    rng = np.random.default_rng(3)
    policy, rest = [], []
    for length, advantage in ((5, 1.3), (2, -0.7), (4, -1.1), (1, 0.4), (3, 0.9)):
        x = -rng.exponential(1.5, length)
        near = [x + rng.normal(0, 0.4, length) for _ in range(3)]
        policy.append(x)
        rest.append(Sample(*near, advantage))
    return policy, rest


Formula = Callable[[list[np.ndarray], list[np.ndarray], list[Sample]], float]


def minimum(ratio: Any, a: float, low: float, high: float) -> Any:
    return np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)


def over_sequences(of_sequence: Callable[[np.ndarray, np.ndarray, Sample], Any]) -> Formula:
    """1/G sum_i 1/|o_i| sum_t."""
    return lambda x, z, rest: np.mean(
        [np.mean(of_sequence(*each)) for each in zip(x, z, rest, strict=True)]
    )


def over_tokens(of_sequence: Callable[[np.ndarray, np.ndarray, Sample], Any]) -> Formula:
    """1 / sum_i |o_i| sum_i sum_t."""
    return lambda x, z, rest: (
        sum(np.sum(of_sequence(*each)) for each in zip(x, z, rest, strict=True)) / sum(map(len, x))
    )


def k3(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.exp(reference - x) - (reference - x) - 1


def gmpo(x: np.ndarray, z: np.ndarray, s: Sample) -> float:
    """{prod_t |min(rho A, clip(rho, e^-0.4, e^0.5) A)|}^(1 / |o|) sgn A: equation 4."""
    rho, a = np.exp(x - s.old), s.advantage
    bounded = np.minimum(rho * a, np.clip(rho, np.exp(-0.4), np.exp(0.5)) * a)
    return np.prod(np.abs(bounded)) ** (1 / len(x)) * np.sign(a)


def gspo(x: np.ndarray, z: np.ndarray, s: Sample) -> float:
    """Equations 5 and 7; a sequence counts once."""
    ratio = (np.prod(np.exp(x)) / np.prod(np.exp(s.old))) ** (1 / len(x))
    return float(minimum(ratio, s.advantage, 0.05, 0.1))


def gspo_token(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    """Equations 13 and 14."""
    ratio = (np.prod(np.exp(z)) / np.prod(np.exp(s.old))) ** (1 / len(x))
    return minimum(ratio * np.exp(x) / np.exp(z), s.advantage, 0.05, 0.1)


def sapo(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    """Equations 5 and 6."""
    tau = 1.0 if s.advantage > 0 else 1.05
    return 4 / tau / (1 + np.exp(-tau * (np.exp(x - s.old) - 1))) * s.advantage


def cispo(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    """Equations 4 and 5."""
    return np.clip(np.exp(z - s.old), 1 - 0.3, 1 + 0.4) * s.advantage * x


def rloo_formula(x: Any, z: Any, rest: list[Sample]) -> float:
    """1/G sum_i A_i log pi(y_i), with the gradient of section 3.2; off policy weighted by r."""
    of_each = zip(x, z, rest, strict=True)
    return np.mean([np.sum(np.exp(z - s.old) * s.advantage * x) for x, z, s in of_each])


def ppo(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    return minimum(np.exp(x - s.old), s.advantage, 0.2, 0.3)


def with_k3(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    return ppo(x, z, s) - 0.1 * k3(x, s.reference)


def truncated(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    return ppo(x, z, s) * np.minimum(np.exp(s.old - s.sampler), 1.2)


def icepop(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    weight = np.exp(s.old - s.sampler)
    return ppo(x, z, s) * np.where((weight >= 0.7) & (weight <= 1.3), weight, 0)


def truncated_sequence(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    return ppo(x, z, s) * min(np.prod(np.exp(s.old) / np.exp(s.sampler)), 1.2)


def masked_sequence(x: np.ndarray, z: np.ndarray, s: Sample) -> np.ndarray:
    weight = np.prod(np.exp(s.old) / np.exp(s.sampler))
    return ppo(x, z, s) * (weight if 0.7 <= weight <= 1.5 else 0)


def constant(x: Any, z: Any, rest: list[Sample]) -> float:
    """Dr. GRPO: 1/G sum_i sum_t, here by a length of 7, too."""
    return sum(np.sum(ppo(*each)) for each in zip(x, z, rest, strict=True)) / len(x) / 7


def kl_in_loss(penalty: Callable[[np.ndarray, np.ndarray, Sample], np.ndarray]) -> Formula:
    return over_sequences(lambda x, z, s: ppo(x, z, s) - 0.3 * penalty(x, z, s))


CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "importance_cap": None}
NO_KL: dict[str, Any] = {**CLIP, "kl_coefficient": 0.0}
KL: dict[str, Any] = {**CLIP, "kl_coefficient": 0.3}
NARROW: dict[str, Any] = {"clip_low": 0.05, "clip_high": 0.1, "importance_cap": None}
CASES: dict[str, tuple[Any, Formula]] = {
    "grpo": (GRPO(**CLIP, kl_coefficient=0.1), over_sequences(with_k3)),
    "dr_grpo": (DrGRPO(**CLIP, constant_length=7), constant),
    "dapo": (DAPO(**CLIP), over_tokens(ppo)),
    "gspo": (GSPO(**NARROW), over_sequences(gspo)),
    "gspo token": (GSPO(form="token", **NARROW), over_sequences(gspo_token)),
    "cispo": (CISPO(clip_low=0.3, clip_high=0.4, importance_cap=None), over_tokens(cispo)),
    "sapo": (SAPO(importance_cap=None), over_sequences(sapo)),
    "gmpo": (GMPO(clip_high=0.5, importance_cap=None), over_sequences(gmpo)),
    "rloo": (RLOO(importance_cap=None), rloo_formula),
    "reinforce_plus_plus": (ReinforcePlusPlus(**CLIP), over_sequences(ppo)),
    "ppo": (PPO(**CLIP), over_tokens(ppo)),
    "truncated": (GRPO(**{**NO_KL, "importance_cap": 1.2}), over_sequences(truncated)),
    "icepop": (
        GRPO(
            **{**NO_KL, "importance_cap": 1.3},
            importance_correction="masked",
            importance_floor=0.7,
        ),
        over_sequences(icepop),
    ),
    "truncated sequence": (
        GRPO(**{**NO_KL, "importance_cap": 1.2}, importance_level="sequence"),
        over_sequences(truncated_sequence),
    ),
    "masked sequence": (
        GRPO(
            **{**NO_KL, "importance_cap": 1.5},
            importance_correction="masked",
            importance_floor=0.7,
            importance_level="sequence",
        ),
        over_sequences(masked_sequence),
    ),
    "k2": (
        GRPO(**KL, kl_estimator="k2"),
        kl_in_loss(lambda x, z, s: (x - s.reference) ** 2 / 2),
    ),
    "k1 weighted": (
        GRPO(**KL, kl_estimator="k1", kl_weighted=True),
        kl_in_loss(lambda x, z, s: np.exp(x - s.old) * (x - s.reference)),
    ),
    "k2 weighted": (
        GRPO(**KL, kl_estimator="k2", kl_weighted=True),
        kl_in_loss(lambda x, z, s: np.exp(z - s.old) * (x - s.reference) ** 2 / 2),
    ),
    "k3 weighted": (
        GRPO(**KL, kl_weighted=True),
        kl_in_loss(lambda x, z, s: np.exp(x - s.old) * k3(x, s.reference)),
    ),
}


def in_rows(
    policy: list[np.ndarray], rest: list[Sample], rows: list[list[int]]
) -> tuple[np.ndarray, dict[str, np.ndarray], list[tuple[int, int]]]:
    """Arrays [rows, time] with two tokens of a prompt before each sequence, junk outside of the
    mask, and where each trained token is."""
    time = max(sum(2 + len(policy[i]) for i in row) for row in rows) + 1
    shape = len(rows), time
    arrays = {name: np.full(shape, -9.0) for name in ("x", "old", "reference", "sampler")}
    arrays |= {name: np.zeros(shape) for name in ("advantages", "lengths", "mask")}
    ids, where = np.zeros(shape, np.int32), {}
    for r, row in enumerate(rows):
        start = 0
        for n, i in enumerate(row, start=1):
            end = start + 2 + len(policy[i])
            ids[r, start:end] = n
            at = slice(start + 2, end)
            arrays["x"][r, at], arrays["mask"][r, at] = policy[i], 1
            for name in ("old", "reference", "sampler"):
                arrays[name][r, at] = getattr(rest[i], name)
            arrays["advantages"][r, start:end] = rest[i].advantage
            arrays["lengths"][r, at] = len(policy[i])
            where[i] = [(r, t) for t in range(start + 2, end)]
            start = end
    return arrays.pop("x"), {**arrays, "ids": ids}, [p for i in sorted(where) for p in where[i]]


ROWS = {"alone": [[0], [1], [2], [3], [4]], "packed": [[0, 1, 3], [2, 4]]}


def differences(formula: Formula, x: list[np.ndarray], rest: list[Sample]) -> Iterator[float]:
    """The derivative of a formula by each log-prob."""
    for i, values in enumerate(x):
        for t in range(len(values)):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [each.copy() for each in x]
                moved[i][t] += step
                sides.append(formula(moved, x, rest))
            yield (sides[0] - sides[1]) / 2e-5


def loss_of(objective: Any, arrays: dict[str, np.ndarray], *, old: bool = True) -> Any:
    def loss(x: jax.Array) -> jax.Array:
        tokens = PolicyTokens(
            x,
            jnp.asarray(arrays["advantages"]),
            jnp.asarray(arrays["mask"]),
            jnp.asarray(arrays["old"]) if old else None,
            jnp.asarray(arrays["reference"]),
            jnp.asarray(arrays["sampler"]),
            segment_ids=jnp.asarray(arrays["ids"]),
        )
        weights = token_weights(
            tokens.mask,
            objective.normalisation,
            constant_length=objective.constant_length,
            lengths=jnp.asarray(arrays["lengths"]),
            sequences=5,
        )
        return jnp.sum(token_terms(objective, tokens).loss * weights)

    return loss


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_papers_formula(name: str, rows: str) -> None:
    settings, formula = CASES[name]
    policy, rest = samples()
    x, arrays, where = in_rows(policy, rest, ROWS[rows])
    with jax.enable_x64(True):
        loss = loss_of(make_objective(settings), arrays)
        value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x))
    # The weights of tokens are float32.
    np.testing.assert_allclose(value, -formula(policy, policy, rest), rtol=1e-6)
    numeric = -np.asarray(list(differences(formula, policy, rest)))
    np.testing.assert_allclose([gradient[at] for at in where], numeric, rtol=1e-6, atol=1e-9)
    outside = np.asarray(gradient)[arrays["mask"] == 0]
    assert (outside == 0).all() and np.abs(numeric).max() > 1e-3


def test_every_kind_is_compared() -> None:
    assert {settings.kind for settings, _ in CASES.values()} == set(NAMED)


def test_on_policy_all_have_the_gradient_of_reinforce() -> None:
    """Where pi is pi_old, every ratio is 1, and nothing is clipped: A grad log pi."""
    policy, rest = samples()
    x, arrays, where = in_rows(policy, rest, ROWS["packed"])
    advantages = np.concatenate([[s.advantage] * len(s.old) for s in rest])
    lengths = np.concatenate([[len(s.old)] * len(s.old) for s in rest])
    by = {
        "sequence_mean": 5 * lengths,
        "token_mean": len(lengths),
        "sequence_sum": 5,
        "constant": 5 * 7,
    }
    for name in NAMED:
        kind = type(CASES[name][0])
        given = {"constant_length": 7} if name == "dr_grpo" else {}
        objective = make_objective(kind(**given, kl_coefficient=0.0, importance_cap=None))
        with jax.enable_x64(True):
            gradient = jax.jit(jax.grad(loss_of(objective, arrays, old=False)))(jnp.asarray(x))
        expected = -advantages / by[objective.normalisation]
        np.testing.assert_allclose(
            [gradient[at] for at in where], expected, rtol=1e-6, err_msg=name
        )


def test_the_entropy_bonus_by_hand() -> None:
    ones = jnp.ones((1, 2))
    tokens = PolicyTokens(-ones, jnp.zeros(1), ones, entropy=jnp.asarray([[2.0, 3.0]]))
    objective = make_objective(GRPO(entropy_coefficient=0.1, kl_coefficient=0, importance_cap=None))
    np.testing.assert_allclose(token_terms(objective, tokens).loss, [[-0.2, -0.3]], rtol=1e-6)
    with pytest.raises(ValueError, match="entropy_coefficient = 0.1 needs entropy"):
        token_terms(objective, tokens._replace(entropy=None))


def test_what_is_missing_is_named() -> None:
    tokens = PolicyTokens(jnp.zeros((2, 3)), jnp.zeros(2), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="kl_coefficient = 0.001 needs reference_log_probs"):
        token_terms(grpo(), tokens)
    assert grpo().needs == ("reference_log_probs", "sampler_log_probs")
    in_reward = make_objective(RLOO(kl_coefficient=0.1, importance_cap=None))
    assert in_reward.needs == ("reference_log_probs", "old_log_probs", "segment_ids")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: GRPO(kl_estimator="k1"), "'k1' in the loss penalises nothing"),
        (lambda: RLOO(kl_weighted=True), "kl_weighted = true belongs to kl_in 'loss'"),
        (lambda: GSPO(clip_low=-1e-3), "clip_low = -0.001: must not be negative"),
        (lambda: SAPO(temperature_negative=0), "temperature_negative = 0: must be positive"),
        (lambda: DAPO(dual_clip=0.5), "dual_clip = 0.5: must be above 1"),
        (lambda: GMPO(constant_length=5), "constant_length = 5: constant_length belongs to"),
        (lambda: DrGRPO(constant_length=0), "constant_length = 0: must be at least 1"),
        (lambda: CISPO(importance_cap=0), "importance_cap = 0: must be positive"),
        (lambda: RLOO(importance_floor=0.5), "importance_floor = 0.5 belongs to"),
        (lambda: GRPO(kl_coefficient=-1), "kl_coefficient = -1: must not be negative"),
    ],
)
def test_bad_settings_are_refused(settings: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings()
