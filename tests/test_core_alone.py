"""The core in an environment of jax, flax, optax, numpy, and what these four need themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib.util
import jax, jax.numpy as jnp, numpy as np, optax

for name in ("pydantic", "transformers", "tokenizers", "jaxtyping", "sympy", "matplotlib"):
    assert importlib.util.find_spec(name) is None, name

from r1jax.grpo import GRPOBatch, GRPOConfig, group_advantages, init_train_state, make_grpo_step
from r1jax.models import Decoder, Execution, ModelConfig, TokenRows, init_params, token_log_probs
from r1jax.objectives import kl, normalisation, objective, policy_loss, preference_loss
from r1jax.policy_step import make_policy_step
from r1jax.sampler import GenerateOptions, Prompts, generate
from r1jax.sharding import single_device

config = ModelConfig("qwen2", 11, 8, 16, 1, 2, 1, 4)
execution = Execution(compute_dtype=jnp.float32, remat="none")
model = Decoder(config, execution, single_device())
params = init_params(jax.random.key(0), config, model.layout)
prompts = Prompts(
    jnp.ones((2, 4), jnp.int32), jnp.full(2, 4, jnp.int32), jnp.arange(2, dtype=jnp.uint32)
)
options = GenerateOptions(samples=2, max_new_tokens=4, seed=0)
samples = generate(params, prompts, model, options)
tokens = jnp.concatenate([jnp.ones((4, 4), jnp.int32), samples.tokens.reshape(4, 4)], axis=1)
positions = jnp.broadcast_to(jnp.arange(8), tokens.shape)
values = group_advantages((samples.tokens == 3).mean(axis=-1)).values.ravel()
batch = GRPOBatch((tokens, positions, jnp.ones_like(tokens)), positions >= 4, values)
optimizer = optax.adam(1e-3)
step = make_grpo_step(
    lambda params, batch: token_log_probs(params, TokenRows(*batch.inputs), model).log_probs,
    optimizer,
    GRPOConfig(kl_coefficient=0.0),
)
state, metrics = jax.jit(step)(init_train_state(params, optimizer), batch)
assert metrics["optimizer/finite"] == 1 and state.step == 1
gspo = objective.make_objective(objective.GSPO(importance_cap=None))
step = make_policy_step(lambda params, batch: batch.inputs[1] * params, optimizer, gspo)
assert callable(step)
print("done")
"""


def needed(*names: str) -> set[str]:
    """The distributions, and all that they require."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, distribution(name).requires or [])
            waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate()]
    return found


def test_the_core_needs_four_packages(tmp_path: Path) -> None:
    for name in needed("jax", "flax", "optax", "numpy"):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            link = tmp_path / top
            if not link.exists():
                link.symlink_to(distribution(name).locate_file(top))
    (tmp_path / "r1jax").symlink_to(ROOT / "r1jax")
    compiled = {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))}
    run = subprocess.run(
        # Without the packages of this environment.
        [sys.executable, "-S", "-c", PROGRAM],
        env={**compiled, "PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr
    assert "PyTorch" not in run.stderr
