"""One HTML page that says what a run did, complete in itself; and one for several seeds."""

from r1jax.report.page import write_report
from r1jax.report.seeds import write_seeds_report

__all__ = ["write_report", "write_seeds_report"]
