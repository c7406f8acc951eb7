"""What the TPU compiler is told in place of its defaults, for a kind of chip."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "LIBTPU_INIT_ARGS"  # of the environment, read when the first device is touched

# By JAX's name of the chip. A TPU7x lays 16-bit arrays out in tiles of 16 x 128 where it expects a
# gain, but takes arguments, and what Pallas kernels read, in tiles of 8 x 128. So programs copy all
# weights first, and the decode loop copies the whole KV cache for each layer of each step.
_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": False}
}


def compiler_options(device_kind: str) -> dict[str, bool]:
    """Options for `Lowered.compile`; none where the defaults are right."""
    return dict(_OPTIONS.get(device_kind, {}))


def unset_flags(device_kind: str, environment: Mapping[str, str]) -> str | None:
    """A warning where this chip's options are not in the environment of the process."""
    given = environment.get(VARIABLE, "")
    flags = [
        f"--{name}={str(value).lower()}"
        for name, value in compiler_options(device_kind).items()
        if name not in given
    ]
    if not flags:
        return None
    value = " ".join([*given.split(), *flags])
    return (
        f"{VARIABLE} has no {' '.join(flags)}: on a {device_kind} sampling copies the whole KV "
        f"cache for each layer of each token; start the run with {VARIABLE}='{value}'"
    )
