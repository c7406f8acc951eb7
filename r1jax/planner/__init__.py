"""What a run would take on a slice that need not be there, by compiling all of it."""

from r1jax.planner.plan import Plan, ProgramPlan, StagePlan, parse_mesh, plan, plan_all
from r1jax.planner.report import as_json, print_plans
from r1jax.planner.topologies import CHIPS, Slice, attached, fake_devices, tpu_slice

__all__ = [
    "CHIPS",
    "Plan",
    "ProgramPlan",
    "Slice",
    "StagePlan",
    "as_json",
    "attached",
    "fake_devices",
    "parse_mesh",
    "plan",
    "plan_all",
    "print_plans",
    "tpu_slice",
]
