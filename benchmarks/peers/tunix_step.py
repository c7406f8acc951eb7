"""Seconds of tunix's GRPO step on the common workload; run by `beside_peers.py`.

pip install google-tunix==0.1.7 'jax<0.11'
python benchmarks/peers/tunix_step.py [--long-tail]
"""

import json
import os
import sys
import time
from itertools import pairwise

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

LONG_TAIL = "--long-tail" in sys.argv
PROMPTS, SAMPLES, STEPS = 16, 8, 8
NEW_TOKENS = 512 if LONG_TAIL else 64
EOS_IDS = list(range(400, 408)) if LONG_TAIL else [-1]  # 8 of 512 end a sample, or none does


class Bytes:
    def encode(self, text, **_):
        return [3 + byte for byte in text.encode()]

    def decode(self, ids, **_):
        lengths.append(len(ids))
        return bytes(int(i) - 3 for i in ids if 3 <= i < 259).decode(errors="replace")

    def bos_id(self):
        return 1

    def eos_id(self):
        return EOS_IDS[0] if LONG_TAIL else 2

    def pad_id(self):
        return 0


lengths, begins = [], []
config = qwen3.ModelConfig(
    num_layers=4,
    vocab_size=512,
    embed_dim=128,
    hidden_dim=512,
    num_heads=4,
    head_dim=32,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-6,
    use_tied_embedding=True,
)
mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
roles = rl_cluster.Role
cluster = rl_cluster.RLCluster(
    actor=qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
    reference=qwen3.Qwen3(config, rngs=nnx.Rngs(0)),
    tokenizer=Bytes(),
    cluster_config=rl_cluster.ClusterConfig(
        role_to_mesh={role: mesh for role in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-4), eval_every_n_steps=10**9, max_steps=STEPS
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=NEW_TOKENS,
            max_prompt_length=32,
            kv_cache_size=NEW_TOKENS + 64,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=EOS_IDS,
        ),
    ),
)


def reward(prompts, completions, **_):
    begins.append(time.perf_counter())
    return [float(len(each) % 7) for each in completions]


texts = [f"hello this is a prompt number {i:02d}" for i in range(PROMPTS)]
algorithm = grpo_learner.GRPOConfig(num_generations=SAMPLES, beta=0.04)
learner = grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=algorithm)
learner.train([{"prompts": np.array(texts)}] * STEPS)
print(f"lengths: mean {np.mean(lengths):.0f}, max {max(lengths)}")
# From one rollout's end to the next one's: an update and a rollout.
print(json.dumps({"step_seconds": [after - before for before, after in pairwise(begins)]}))
