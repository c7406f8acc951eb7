"""What a run would take on a slice that need not be there, by compiling all of it."""

from r1jax.planner.plan import (
    Case,
    Plan,
    PlanOptions,
    distinct_stages,
    parse_mesh,
    plan,
    plan_all,
    plan_case,
)
from r1jax.planner.report import as_json, as_markdown, has_margin, print_plans
from r1jax.planner.topologies import Slice, attached, fake_devices, tpu_slice

__all__ = [
    "Case",
    "Plan",
    "PlanOptions",
    "Slice",
    "as_json",
    "as_markdown",
    "attached",
    "distinct_stages",
    "fake_devices",
    "has_margin",
    "parse_mesh",
    "plan",
    "plan_all",
    "plan_case",
    "print_plans",
    "tpu_slice",
]
