"""Procedural tasks: problems made from their index, for the demo and for tests."""

from collections.abc import Mapping
from types import MappingProxyType

from r1jax.data.tasks.bilingual import Bilingual
from r1jax.data.tasks.running_total import RunningTotal
from r1jax.data.tasks.task import Task as Task
from r1jax.data.tasks.task import task_options as task_options

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {"running_total": RunningTotal, "bilingual": Bilingual}
)
"""Name in `task:NAME` and `characters:NAME` -> the task.

TFDS takes the first where none is named."""
