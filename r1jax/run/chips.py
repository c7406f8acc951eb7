"""What one accelerator has: memory, peak speed, and links to its neighbours."""

from __future__ import annotations

from dataclasses import dataclass

from r1jax.run.gpu_memory import GPU_MEMORY_SHARE


@dataclass(frozen=True)
class Torus:
    """Links between neighbours, as of a TPU slice.

    link_bandwidth: bytes per second of one link in one direction. dimensions: of the torus. wraps:
    an axis of so many chips, or a multiple, is a ring; a shorter one a line.
    """

    link_bandwidth: float
    dimensions: int
    wraps: int


@dataclass(frozen=True)
class Switch:
    """Each device of a host reaches each other one at the same speed, as by NVLink and NVSwitch.

    bandwidth: bytes per second that a device sends. devices: the most that a host has.
    """

    bandwidth: float
    devices: int


@dataclass(frozen=True)
class Efficiency:
    """What programs reach of a chip's peaks, as measured.

    flops, hbm_bandwidth: shares of the peaks. launch_seconds: the least time of an operation, which
    is a kernel of its own. kernels: shares of the peak FLOP/s of kernels that XLA does not make, by
    the beginning of their name. source: what was measured, on what.
    """

    flops: float
    hbm_bandwidth: float
    launch_seconds: float
    kernels: tuple[tuple[str, float], ...]
    source: str

    def of_kernel(self, name: str) -> float:
        """The share of the peak FLOP/s; name: "" for what XLA makes."""
        known = (n for start, n in self.kernels if name and name.startswith(start))
        return next(known, self.flops)


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    platform: `tpu` or `gpu`. hbm: bytes. flops: peak in bfloat16, per second. hbm_bandwidth: bytes
    per second. devices: what JAX sees of a chip. between_slices: bytes per second of a chip's share
    in the network between slices, or between the hosts of GPUs, where published. efficiency: None
    where nothing was measured, and times are those of a perfect machine.
    """

    platform: str
    hbm: float
    flops: float
    hbm_bandwidth: float
    network: Torus | Switch
    devices: int = 1
    between_slices: float | None = None
    efficiency: Efficiency | None = None


_GIB = 2**30
# A host of eight (DGX H100 and H200, HGX): NVLink 4 gives a GPU 900 GB/s, both directions together.
_NVLINK = Switch(450e9, 8)

# One H200, JAX 0.11.2: its products reach 670 to 790 TFLOP/s, its copies 3.3 to 4.3 TB/s. Causal
# attention, bfloat16, 12 heads of 128, forward and backward: JAX's kernel takes 0.85 and 2.55 ms of
# 8 rows of 2,048 tokens, 1.7 and 9.3 ms of 2 of 8,192; cuDNN's without segments 0.50 and 0.90, 1.05
# and 2.35 ms (harmonic means of the two lengths' shares). This package's kernel was not measured,
# and is taken for JAX's. A kernel's least time is what a token of 256 samples takes, between layers
# in a loop and one by one. What else was measured there, and not fitted:
# benchmarks/gpu_estimates.py.
_H200 = Efficiency(
    flops=0.74,
    hbm_bandwidth=0.8,
    launch_seconds=2.5e-6,
    kernels=(
        ("mha_forward", 0.17),
        ("mha_backward", 0.156),
        ("flash_attention", 0.156),
        ("fmhaSoftmaxBackward", 0.37),
        ("fmhaSoftmax", 0.29),
    ),
    source="measured on one H200 with JAX 0.11.2 (benchmarks/gpu_estimates.py)",
)


def _hopper(mebibytes: int, hbm_bandwidth: float) -> Chip:
    hbm = GPU_MEMORY_SHARE * mebibytes * 2**20
    between = 50e9  # each GPU of such a host has a network adapter of 400 Gbit/s
    return Chip("gpu", hbm, 989e12, hbm_bandwidth, _NVLINK, 1, between, _H200)


# Google Cloud's pages on each TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x): peak
# bfloat16 FLOP/s, bandwidth of HBM, and the bandwidth of a chip's interconnect, both directions of
# all its links (v4 600 GB/s, v5e 400, v5p 1,200, v6e 800, TPU7x 1,200): six links in a 3D torus,
# four in a 2D one. Slices of v4, v5p and TPU7x have rings along axes of whole cubes of
# 4 x 4 x 4, those of v5e and v6e along axes of 16. HBM is what the compiler leaves to a program, a
# little less than the 32, 16, 95, 32 and 192 GiB that the chips have. Between slices: 6.4 Tbit/s of
# 256 chips (v5e), 50 Gbit/s of a chip (v5p), 25.6 Tbit/s of 256 chips (v6e).
#
# NVIDIA's data sheets of the H100 SXM and H200 SXM: 989 TFLOP/s of dense bfloat16; 80 GB at 3.35
# TB/s, 141 GB at 4.8 TB/s. HBM is the part that a run takes of what the driver shows, in MiB. The
# H100's shares of the peaks are those of the H200, which has the same multiprocessors.
CHIPS = {
    "v4": Chip("tpu", 30.75 * _GIB, 275e12, 1228e9, Torus(50e9, 3, 4)),
    "v5e": Chip("tpu", 15.75 * _GIB, 197e12, 819e9, Torus(50e9, 2, 16), between_slices=3.125e9),
    "v5p": Chip("tpu", 95 * _GIB, 459e12, 2765e9, Torus(100e9, 3, 4), between_slices=6.25e9),
    "v6e": Chip("tpu", 31.24 * _GIB, 918e12, 1638e9, Torus(100e9, 2, 16), between_slices=12.5e9),
    "tpu7x": Chip("tpu", 189.48 * _GIB, 2307e12, 7380e9, Torus(100e9, 3, 4), devices=2),
    "h100": _hopper(81_559, 3350e9),
    "h200": _hopper(143_771, 4800e9),
}
# What JAX calls those that are attached.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
