"""Rule rewards on the host: named functions, run in worker processes with deadlines.

    with Verifier(config.rewards, config.verifier) as verifier:
        pending = verifier.submit(rows)  # returns at once
        ...                              # generate the next batch
        scores = pending.result()        # in order

One completion, in this process: `score`. Workers import this package, so it imports
neither numpy, jax, pydantic, transformers nor sympy.
"""

from r1jax.rewards import choice as _choice  # noqa: F401  (registers its reward, as the others do)
from r1jax.rewards import code as _code  # noqa: F401
from r1jax.rewards import format as _format  # noqa: F401
from r1jax.rewards import gym as _gym  # noqa: F401
from r1jax.rewards import overlong as _overlong  # noqa: F401
from r1jax.rewards import readable as _readable  # noqa: F401
from r1jax.rewards import structure as _structure  # noqa: F401
from r1jax.rewards.language import language_share, words_by_language
from r1jax.rewards.maths import equivalent_key, final_answer, same_answer
from r1jax.rewards.references import unreadable_references
from r1jax.rewards.registry import (
    REWARDS,
    Outcome,
    RewardEntry,
    RewardFunction,
    RewardInput,
    RewardOptions,
    Score,
    check_reward,
    reward,
)
from r1jax.rewards.scoring import score, score_file
from r1jax.rewards.verifier import Pending, RowScore, Verifier, VerifierError

Answered = RewardInput  # as it was called in 0.1.0: functions of users import it

__all__ = [
    "REWARDS",
    "RewardInput",
    "Outcome",
    "Pending",
    "RewardEntry",
    "RewardFunction",
    "RewardOptions",
    "RowScore",
    "Score",
    "Verifier",
    "VerifierError",
    "check_reward",
    "equivalent_key",
    "final_answer",
    "language_share",
    "reward",
    "same_answer",
    "score",
    "score_file",
    "unreadable_references",
    "words_by_language",
]
