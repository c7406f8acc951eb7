"""r1jax: the DeepSeek-R1 recipe as pure JAX functions.

    model = r1jax.load_model("Qwen/Qwen2.5-1.5B", mesh={"fsdp": -1})  # open a checkpoint on a mesh
    texts = r1jax.sample(model, ["What is 12 plus 7?"], samples=4)    # sample it
    log_probs = r1jax.log_probs(model, [model.tokenizer.encode("12 plus 7 is 19.")])
    score = r1jax.score(texts[0][0], "19", reward="accuracy")         # a rule reward, without JAX
    step = jax.jit(r1jax.make_grpo_step(log_prob_fn, optimizer))      # one GRPO update of any model

A name is imported when it is first used: a reward or a config needs no JAX, and loads none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1jax.grpo import (
        GRPOBatch,
        GRPOConfig,
        group_advantages,
        init_train_state,
        make_grpo_step,
    )
    from r1jax.policy_step import make_policy_step
    from r1jax.pretrained import load_model, log_probs, sample
    from r1jax.rewards.scoring import score

__all__ = [
    "GRPOBatch",
    "GRPOConfig",
    "__version__",
    "group_advantages",
    "init_train_state",
    "load_model",
    "log_probs",
    "make_grpo_step",
    "make_policy_step",
    "sample",
    "score",
]

__version__: str

_MODULES = {
    **dict.fromkeys(["load_model", "log_probs", "sample"], "r1jax.pretrained"),
    "score": "r1jax.rewards.scoring",
    "make_policy_step": "r1jax.policy_step",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("r1jax")
    if name not in __all__:
        raise AttributeError(f"module 'r1jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, "r1jax.grpo")), name)


def __dir__() -> list[str]:
    return list(__all__)
