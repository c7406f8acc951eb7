"""Where tests look at no figure none is drawn, in no process; elsewhere they all are."""

from __future__ import annotations

import forked
from undrawn import undrawn

from r1jax.report import page, plots

DRAW = "from r1jax.report import page; print(page.line_plot([], title='a<b'))"
NOTHING = '<svg role="img" aria-label="a&lt;b"></svg>'


def test_nothing_is_drawn_in_the_block_alone() -> None:
    assert page.line_plot is plots.line_plot
    with undrawn():
        assert page.line_plot([], title="a<b") == NOTHING
        assert forked.run("-c", DRAW).stdout.strip() == NOTHING
    assert page.line_plot is plots.line_plot
    drawn = forked.run("-c", DRAW)
    assert "data-plot" in drawn.stdout, drawn.stderr
