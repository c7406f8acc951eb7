"""One HTML page that says what a run did, complete in itself."""

from r1jax.report.page import write_report

__all__ = ["write_report"]
