"""How tests compile: quickly, for as many devices as they ask for, and each program once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHES = ROOT / ".jax_cache"
LIMIT = 2**30  # bytes

# The programs of the tests are small and run a few times: optimizing them takes ten times as long
# as all else together, and to split them for several threads an eighth of the rest.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)

# A gather, a product and a loop: what the processors that refuse their own programs stumble over.
PROBE = """
import jax, jax.numpy as jnp
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append("cache_hits" in name))
step = jax.jit(jax.grad(lambda x, i: jax.lax.scan(
    lambda c, a: (jnp.tanh(c @ a), c.sum()), x[i], jnp.stack([x] * 3))[0].sum()))
step(jnp.ones((16, 16)), jnp.arange(16)).block_until_ready()
print(sum(hits))
"""


def devices(count: int) -> dict[str, str]:
    """Environment of a process that sees this many CPU devices."""
    return {"XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={count}"}


def cache() -> dict[str, str]:
    """Environment of processes that keep every compiled program where the next one finds it.

    Empty where this processor refuses programs that it compiled itself (see
    r1jax/compilation_cache.py), which is tried once; and where JAX has been given a directory.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return {}
    directory = CACHES / _machine()
    for other in CACHES.glob("*"):
        if other != directory or sum(f.stat().st_size for f in other.iterdir()) > LIMIT:
            shutil.rmtree(other)
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    verdict = directory / "accepted"
    if not verdict.exists():
        directory.mkdir(parents=True, exist_ok=True)
        verdict.write_text("yes" if _accepted(os.environ | variables) else "no")
    return variables if verdict.read_text() == "yes" else {}


def _machine() -> str:
    """What compiled programs depend on beside the key that JAX gives them: versions, processor."""
    about = [version("jax"), version("jaxlib"), sys.version]
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        lines = processor.read_text().partition("\n\n")[0].splitlines()
        about += [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]


def _accepted(environment: dict[str, str]) -> bool:
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True
        )
    return run.returncode == 0 and int(run.stdout) > 0 and not run.stderr
