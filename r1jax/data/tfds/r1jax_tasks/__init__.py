"""`tfds.builder("r1jax_tasks/NAME")`, once this package has been imported."""

from r1jax.data.tfds.r1jax_tasks.r1jax_tasks_dataset_builder import Builder

__all__ = ["Builder", "TaskConfig"]
