"""The clipped loss and each of its parts against hand-worked numbers, and what they refuse."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.objectives.corrections import (
    importance_weight,
    masked_importance_weight,
    masked_sequence_importance_weight,
    sequence_importance_weight,
)
from r1jax.objectives.objective import PolicyTokens, TokenTerms, grpo_of_config, token_terms
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
from r1jax.settings.objective import GRPOConfig


def both(function: Any, **options: Any) -> list[Any]:
    function = functools.partial(function, **options)
    return [function, jax.jit(function)]


def terms_of(
    log_probs: jax.Array, advantages: jax.Array, config: GRPOConfig, **arrays: Any
) -> TokenTerms:
    """Of tokens that are all trained."""
    tokens = PolicyTokens(log_probs, advantages, jnp.ones(jnp.shape(log_probs)), **arrays)
    return token_terms(grpo_of_config(config), tokens)


def column(*values: float) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[:, None]


def test_the_ratio_by_hand() -> None:
    log_probs = jnp.log(jnp.asarray([[0.5, 0.1]]))
    for ratio in both(log_ratio):
        old = jnp.log(jnp.asarray([[0.25, 0.2]]))
        np.testing.assert_allclose(jnp.exp(ratio(log_probs, old)), [[2.0, 0.5]], rtol=1e-6)
        np.testing.assert_array_equal(ratio(log_probs), [[0.0, 0.0]])
    # On policy its gradient is that of the log-probs.
    gradient = jax.grad(lambda x: jnp.exp(log_ratio(x)).sum())(log_probs)
    np.testing.assert_array_equal(gradient, [[1.0, 1.0]])


def test_ratios_of_sequences_by_hand() -> None:
    # Ratios 4, 1 and 2 of three tokens: of the first two together 2 = 4 ** (1 / 2).
    log_probs, old = (
        jnp.log(jnp.asarray([[0.8, 0.3, 0.4]])),
        jnp.log(jnp.asarray([[0.2, 0.3, 0.2]])),
    )
    mask, ids = jnp.ones((1, 3)), jnp.asarray([[1, 1, 2]])
    for function in both(sequence_log_ratio) + both(sequence_token_log_ratio):
        np.testing.assert_allclose(
            jnp.exp(function(log_probs, old, mask, ids)), [[2, 2, 2]], rtol=1e-6
        )
        alone = function(log_probs, old, mask)
        np.testing.assert_allclose(jnp.exp(alone), [[2, 2, 2]], rtol=1e-6)  # 8 ** (1 / 3)

    def first(x: jax.Array, function: Any) -> jax.Array:
        return function(x, old, mask, ids)[0, 0]

    # A token's gradient reaches its sequence in the one form, and itself alone in the other.
    gradient = jax.grad(first)(log_probs, sequence_log_ratio)
    np.testing.assert_allclose(gradient, [[0.5, 0.5, 0]])
    gradient = jax.grad(first)(log_probs, sequence_token_log_ratio)
    np.testing.assert_allclose(gradient, [[1, 0, 0]])


# (ratio, advantage, clipped objective, whether it is clipped)
CLIPPED = [
    (1.5, 1.0, 1.3, True),  # above 1 + high
    (0.5, 1.0, 0.5, False),  # the minimum keeps the lower, unclipped term
    (0.5, -1.0, -0.8, True),  # below 1 - low
    (1.5, -1.0, -1.5, False),
    (9.0, -1.0, -9.0, False),
]


def test_the_clipped_surrogate_by_hand() -> None:
    ratios, advantages, expected, clipped = (np.asarray(x) for x in zip(*CLIPPED, strict=True))
    for surrogate in both(clipped_surrogate, clip_low=0.2, clip_high=0.3):
        for a in (jnp.asarray(advantages), column(*advantages)):  # [batch] or [batch, time]
            out = surrogate(column(*ratios), a)
            np.testing.assert_allclose(out.objective[:, 0], expected, rtol=1e-6)
            assert out.clipped[:, 0].tolist() == clipped.tolist()


def test_the_dual_clip_by_hand() -> None:
    before = Surrogate(column(-9.0, -2.0, 5.0), column(0, 1, 0) > 0)
    for clip in both(dual_clip, factor=3.0):
        out = clip(before, jnp.asarray([-1.0, -1.0, 1.0]))
        np.testing.assert_allclose(out.objective[:, 0], [-3.0, -2.0, 5.0])
        assert out.clipped[:, 0].tolist() == [True, True, False]


def test_reinforce_and_cispo_by_hand() -> None:
    ratio, log_probs = column(9.0, 0.5, 2.0), column(-1.0, -2.0, -3.0)
    advantages = jnp.asarray([1.0, -1.0, 2.0])
    for surrogate in both(reinforce_surrogate):
        out = surrogate(ratio, log_probs, advantages)
        np.testing.assert_allclose(out.objective[:, 0], [-9, 1, -12])
        assert not out.clipped.any()
    for surrogate in both(cispo_surrogate, clip_low=0.25, clip_high=4.0):
        out = surrogate(ratio, log_probs, advantages)
        np.testing.assert_allclose(out.objective[:, 0], [-5, 1.5, -12])
        assert out.clipped[:, 0].tolist() == [True, True, False]
    # A clipped token keeps its gradient, that of A log pi by the weight.
    gradient = jax.grad(
        lambda x: cispo_surrogate(
            jnp.exp(x - x + jnp.log(9.0)), x, advantages, clip_low=1.0, clip_high=4.0
        ).objective.sum()
    )(log_probs)
    np.testing.assert_allclose(gradient[:, 0], [5, -5, 10])


def test_the_soft_gate_by_hand() -> None:
    ratio, advantages = column(1.0, 1.0, 3.0), jnp.asarray([2.0, -2.0, 2.0])
    for surrogate in both(sapo_surrogate, temperature_positive=1.0, temperature_negative=2.0):
        out = surrogate(ratio, advantages).objective[:, 0]
        np.testing.assert_allclose(out, [4, -2, 8 / (1 + np.exp(-2))], rtol=1e-6)
    for a in (1.0, -1.0):  # at a ratio of 1 the slope is A, whatever the temperatures
        slope = jax.grad(
            lambda r, a=a: sapo_surrogate(
                r, jnp.asarray([a]), temperature_positive=3.0, temperature_negative=0.5
            ).objective.sum()
        )(column(1.0))
        np.testing.assert_allclose(slope, [[a]], rtol=1e-6)


def test_the_geometric_mean_by_hand() -> None:
    logs = jnp.asarray([[0.2, 0.6, -0.9, 0.0, -1.0]])
    advantages, ids = jnp.asarray([[2.0, 2, 2, -3, -3]]), jnp.asarray([[1, 1, 1, 2, 2]])
    mask = jnp.asarray([[1, 1, 1, 0, 1]])
    for surrogate in both(geometric_mean_surrogate, clip_low=0.4, clip_high=0.5):
        out = surrogate(logs, advantages, mask, ids)
        # Of the first 0.6 is bounded to 0.5, and -0.9 is not; of the second -1 is, to -0.4.
        first, second = 2 * np.exp((0.2 + 0.5 - 0.9) / 3), -3 * np.exp(-0.4)
        expected = [[first, first, first, second, second]]
        np.testing.assert_allclose(out.objective, expected, rtol=1e-6)
        assert out.clipped.tolist() == [[False, True, False, False, True]]
        assert (surrogate(logs, 0 * advantages, mask, ids).objective == 0).all()
        alone = surrogate(logs, jnp.asarray([2.0]), mask)  # one advantage for a row
        expected = 2 * np.exp((0.2 + 0.5 - 0.9 - 1) / 4)
        np.testing.assert_allclose(alone.objective, [[expected] * 5], rtol=1e-6)


def test_weights_of_sequences_by_hand() -> None:
    old, sampler = jnp.log(jnp.asarray([[0.5, 0.5, 0.3]])), jnp.log(jnp.asarray([[0.4, 0.25, 0.6]]))
    mask, ids = jnp.ones((1, 3)), jnp.asarray([[1, 1, 2]])  # 1.25 * 2 = 2.5, and 0.5
    for weight in both(sequence_importance_weight, cap=2.0):
        np.testing.assert_allclose(weight(old, sampler, mask, ids), [[2, 2, 0.5]], rtol=1e-6)
    for weight in both(masked_sequence_importance_weight, floor=0.6, cap=3.0):
        np.testing.assert_allclose(weight(old, sampler, mask, ids), [[2.5, 2.5, 0]], rtol=1e-6)
        np.testing.assert_allclose(weight(old, sampler, mask), [[1.25] * 3], rtol=1e-6)


def test_importance_weights_by_hand() -> None:
    old, sampler = jnp.log(column(0.5, 0.5)), jnp.log(column(0.4, 0.1))
    for weight in both(importance_weight, cap=1.5):
        np.testing.assert_allclose(weight(old, sampler)[:, 0], [1.25, 1.5], rtol=1e-6)
    gradient = jax.grad(lambda x: importance_weight(x, sampler, 1.5).sum())(old)
    assert not gradient.any()


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_masked_importance_weights_against_float64(floor: float) -> None:
    rng = np.random.default_rng(0)
    old, sampler = -rng.exponential(2, (8, 50)), -rng.exponential(2, (8, 50))
    ratio = np.exp(old - sampler)
    expected = np.where((floor <= ratio) & (ratio <= 2.0), ratio, 0.0)
    assert 0.1 < (expected == 0).mean() < 0.9
    pair = jnp.asarray(old, jnp.float32), jnp.asarray(sampler, jnp.float32)
    for weight in both(masked_importance_weight, floor=floor, cap=2.0):
        np.testing.assert_allclose(weight(*pair), expected, rtol=1e-5)
    config = GRPOConfig(
        kl_coefficient=0, importance_correction="masked", importance_floor=floor, importance_cap=2.0
    )
    log_probs, advantages = jnp.asarray(-rng.exponential(2, (8, 50))), rng.standard_normal(8)

    def loss(x: jax.Array) -> jax.Array:
        a = jnp.asarray(advantages, jnp.float32)
        return terms_of(x, a, config, old_log_probs=pair[0], sampler_log_probs=pair[1]).loss.sum()

    value, gradient = jax.value_and_grad(loss)(log_probs)
    r = np.exp(np.asarray(log_probs, np.float64) - old)
    a = advantages[:, None]
    clipped = np.clip(r, 0.8, 1.2)
    np.testing.assert_allclose(
        value, -(expected * np.minimum(r * a, clipped * a)).sum(), rtol=1e-4, atol=1e-4
    )
    free = r * a <= clipped * a  # where the minimum is the unclipped term
    np.testing.assert_allclose(gradient, -expected * a * r * free, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance_cap": None}, "importance_cap = None: set the cap"),
        ({"importance_floor": -0.1}, "importance_floor = -0.1: must be at least 0"),
        ({"importance_floor": 2.0}, "importance_floor = 2.0: .* below importance_cap = 2.0"),
        (
            {"importance_floor": 0.5, "importance_correction": "truncated"},
            "importance_floor = 0.5 belongs to importance_correction 'masked'",
        ),
    ],
)
def test_a_mask_without_bounds_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**{"importance_correction": "masked", **settings})


@pytest.mark.parametrize("case", [*CLIPPED[:4], (9.0, -1.0, -3.0, True)])  # dual clip: 3 |A|
def test_the_parts_together(case: tuple[float, float, float, bool]) -> None:
    ratio, advantage, expected, clipped = case
    config = GRPOConfig(clip_low=0.2, clip_high=0.3, dual_clip=3.0, kl_coefficient=0.0)
    old = jnp.asarray([[-1.0]])
    terms = terms_of(old + jnp.log(ratio), jnp.asarray([advantage]), config, old_log_probs=old)
    np.testing.assert_allclose(terms.loss, [[-expected]], rtol=1e-5)
    assert terms.clipped.item() == clipped


def test_the_penalty_and_the_importance_weight_in_the_loss() -> None:
    log_probs, reference = jnp.log(jnp.asarray([[0.5]])), jnp.log(jnp.asarray([[0.25]]))
    k3 = 0.5 - np.log(0.5) - 1
    config = GRPOConfig(kl_coefficient=0.1, importance_cap=1.5)
    for sampler, weight in ((0.4, 1.25), (0.1, 1.5)):  # the second is truncated
        for function in both(terms_of, config=config):
            terms = function(
                log_probs,
                jnp.asarray([2.0]),
                reference_log_probs=reference,
                sampler_log_probs=jnp.log(jnp.asarray([[sampler]])),
            )
            np.testing.assert_allclose(terms.loss, [[-2 * weight + 0.1 * k3]], rtol=1e-5)
            np.testing.assert_allclose(terms.kl, [[k3]], rtol=1e-5)
    with pytest.raises(ValueError, match="kl_coefficient = 0.1 needs reference_log_probs"):
        terms_of(log_probs, jnp.asarray([2.0]), config)


TOKENS = jnp.zeros((6, 6))  # as many rows as tokens: [6] would broadcast
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
CONFIG = GRPOConfig(dual_clip=3.0)
ALL = {name: TOKENS for name in ("old_log_probs", "reference_log_probs", "sampler_log_probs")}


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (6, 5), (), (6, 6, 1)])
@pytest.mark.parametrize("name", ["log_probs", *ALL])
def test_arrays_that_are_not_per_token_are_refused(name: str, shape: tuple[int, ...]) -> None:
    arrays = {"log_probs": TOKENS, **ALL, name: jnp.zeros(shape)}
    pattern = rf"{name} has shape \({', '.join(map(str, shape))},?\); expected \[batch, time\]"
    for terms in both(terms_of, config=CONFIG):
        with pytest.raises(ValueError, match=pattern) as error:
            terms(advantages=jnp.zeros(6), **arrays)
        assert "(6, 6)" in str(error.value)


@pytest.mark.parametrize("shape", [(6, 1), (1, 6), (5,), (6, 5), (), (1,), (6, 6, 1)])
def test_advantages_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    advantages = jnp.zeros(shape)
    for function in (
        lambda a: terms_of(TOKENS, a, CONFIG, **ALL),
        lambda a: clipped_surrogate(TOKENS, a, **CLIP),
        lambda a: dual_clip(Surrogate(TOKENS, TOKENS > 0), a, 3.0),
    ):
        for call in (function, jax.jit(function)):
            with pytest.raises(ValueError, match="advantages has shape") as error:
                call(advantages)
            assert str(shape) in str(error.value) and "(6, 6)" in str(error.value)
            if shape == (6, 1):
                assert "drop its last axis" in str(error.value)


def test_parts_used_alone_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"old_log_probs has shape \(6,\).*\[batch, time\]"):
        log_ratio(TOKENS, jnp.zeros(6))
    with pytest.raises(ValueError, match=r"sampler_log_probs has shape \(6, 1\)"):
        importance_weight(TOKENS, jnp.zeros((6, 1)), 2.0)
    with pytest.raises(ValueError, match=r"ratio has shape \(6,\)"):
        clipped_surrogate(jnp.zeros(6), jnp.zeros(6), **CLIP)
    # Log-probs of all tokens but the first are a common slip: the message says what to do.
    with pytest.raises(ValueError, match=r"\(6, 5\).*jnp.pad"):
        log_ratio(TOKENS, jnp.zeros((6, 5)))


def test_log_probs_are_floating_point_numbers() -> None:
    whole = jnp.zeros((6, 6), jnp.int32)
    with pytest.raises(ValueError, match="log_probs has dtype int32"):
        terms_of(whole, jnp.zeros(6), CONFIG, **ALL)
    for name in ALL:
        with pytest.raises(ValueError, match=f"{name} has dtype int32"):
            terms_of(TOKENS, jnp.zeros(6), CONFIG, **ALL | {name: whole})
