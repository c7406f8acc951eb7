"""Mixtures of datasets at given shares, which use no row twice."""

from __future__ import annotations

from collections.abc import Mapping


def mixture_counts(
    rows: Mapping[str, int], shares: Mapping[str, float], limit: int | None = None
) -> dict[str, int]:
    """Rows of each part in the largest mixture of these shares, or in one of exactly `limit` rows.

    The part that runs out first sets the size; of the others the first rows are taken. 600,000
    and 200,000 rows at 3 : 1 are all used. With a limit shares are rounded down, and the parts that
    lose most by it get one row more. `rows`: of each part; `shares`: in any unit.

    Raises ValueError: a part would have no row in it, or there are fewer rows than `limit`.
    """
    if limit is not None:
        exact = {part: limit * share / sum(shares.values()) for part, share in shares.items()}
        counts = {part: int(count + 1e-9) for part, count in exact.items()}
        by_loss = sorted(shares, key=lambda part: counts[part] - exact[part])
        for part in by_loss[: limit - sum(counts.values())]:
            counts[part] += 1
        if short := [part for part in shares if counts[part] > rows[part]]:
            raise ValueError(
                f"mixture: {limit} rows need {counts[short[0]]} of {short[0]}, which has "
                f"{rows[short[0]]}; ask for fewer, or change the shares"
            )
    else:
        size = min(rows[part] / share for part, share in shares.items())
        # Not below a whole number by a rounding error: 0.3 * (3 / 0.1) is 8.999999999999998.
        counts = {part: int(size * share + 1e-9) for part, share in shares.items()}
    empty = [part for part, count in counts.items() if count == 0]
    if empty:
        raise ValueError(
            f"mixture: {empty[0]} (of {rows[empty[0]]} rows) would have no row beside "
            f"{dict(rows)} at shares {dict(shares)}; change the shares or the datasets"
        )
    return counts


def mixed_id(row_id: int, part: int, parts: int) -> int:
    """The id of a part's row in the mixture: rows of different parts never share one."""
    return row_id * parts + part
