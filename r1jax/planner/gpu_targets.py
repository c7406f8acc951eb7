"""GPUs as XLA's compiler describes them, so that it compiles for one that is not there.

The text form of XLA's `GpuTargetConfigProto` (xla/stream_executor/device_description.proto). Limits
of a multiprocessor of compute capability 9.0: NVIDIA, CUDA C++ Programming Guide, "Compute
Capabilities". Level-2 cache and number of multiprocessors: NVIDIA H100 Tensor Core GPU
Architecture.
"""

from __future__ import annotations

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


def hopper(name: str, bandwidth: int, memory: int) -> str:
    """The description of a GPU of compute capability 9.0.

    Args:
      name: as JAX has it. bandwidth: bytes per second of its memory. memory: bytes.
    """
    return _HOPPER.format(name=name, bandwidth=bandwidth, memory=memory)
