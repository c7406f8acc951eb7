"""Names of TPU slices: `v5p:4x4x8`, and what Cloud calls the same (`v5p-256`)."""

from __future__ import annotations

import re

# On Cloud an accelerator type counts the chips of 2D kinds, and the cores, two a chip, of others.
_CHIPS = {"v5litepod": "v5e", "v5e": "v5e", "v6e": "v6e"}
_CORES = {"v4": "v4", "v5p": "v5p", "tpu7x": "tpu7x"}
_TYPE = re.compile(rf"(?:([1-9]\d*)x)?({'|'.join([*_CHIPS, *_CORES])})-([1-9]\d*)")


def slice_name(text: str) -> str:
    """The slice that Cloud's accelerator type is, such as `v6e:8x8` for v6e-64.

    `2xv6e-64` is `2xv6e:8x8`, two of them. Any other text stays as it is. A type has the shape that
    Cloud gives it by default.
    """
    parts = _TYPE.fullmatch(text)
    if parts is None:
        return text
    kind, number = parts[2], int(parts[3])
    chips = number if kind in _CHIPS else number // 2
    doublings = chips.bit_length() - 1
    if chips != 1 << doublings:  # of such sizes there are several shapes
        return text
    if kind in _CHIPS:
        shape = [1 << doublings // 2, 1 << (doublings + 1) // 2]
    elif chips == 4:
        shape = [2, 2, 1]
    else:
        shape = [1 << (doublings + extra) // 3 for extra in range(3)]
    several = "" if parts[1] in (None, "1") else f"{parts[1]}x"
    return f"{several}{(_CHIPS | _CORES)[kind]}:{'x'.join(map(str, shape))}"
