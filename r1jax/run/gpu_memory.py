"""The part of a GPU's memory that a run takes as it starts.

JAX takes three quarters unless the environment says otherwise, and a run has the GPU to itself.
What is left is for the libraries' own buffers: CUDA, cuBLAS, cuDNN, NCCL.
"""

from __future__ import annotations

import os

GPU_MEMORY_SHARE = 0.9
_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def take_gpu_memory() -> None:
    """Before JAX starts; a share that is set in the environment stays."""
    os.environ.setdefault(_VARIABLE, str(GPU_MEMORY_SHARE))
