"""Self-correction: what several attempts at a question come to, of every evaluated checkpoint."""

from __future__ import annotations

from r1jax.evaluation.run_directory import Run
from r1jax.report.wording import Figure, Heading, Table, figure


def attempts_table(run: Run, over: str = "problems") -> Table | None:
    """Accuracy of each attempt, the difference, and the shares of samples that were mended and
    spoilt; None where no evaluation has several attempts."""
    rows: list[tuple[Heading, list[Figure]]] = []
    evaluations = [
        (stage, stage.summary["attempts"])
        for stage in run.evaluations()
        if stage.summary is not None and "attempts" in stage.summary
    ]
    rights = max(
        ([name for name in each if name.startswith("right_")] for _, each in evaluations),
        key=len,
        default=[],
    )
    names = [*rights, "difference", "mended", "spoilt"]
    for stage, figures in evaluations:
        cells = [figure(figures.get(name), percent=True) for name in names]
        rows.append((Heading(run.weights_of(stage.name) or stage.name, stage.name), cells))
    if not rows:
        return None
    columns = [Heading(name.replace("right_", "attempt "), "right") for name in rights]
    columns += [Heading("difference", "last and first attempt")]
    columns += [Heading("mended", "wrong, then right"), Heading("spoilt", "right, then wrong")]
    lead = f"Shares of all samples, with 95 % intervals over {over} in small print."
    return Table("Self-correction", lead, columns, rows)
