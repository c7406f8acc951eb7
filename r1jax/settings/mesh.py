"""Settings of the device mesh."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from r1jax.settings.section import Section


def _check_axes(axes: dict[str, int], field: str) -> None:
    """Raises ValueError for sizes that no mesh has."""
    if not axes:
        raise ValueError(f"{field}: a mesh has at least one axis, such as fsdp: -1")
    if sum(size == -1 for size in axes.values()) > 1:
        raise ValueError(f"{field}: at most one axis may be -1")
    for name, size in axes.items():
        if size != -1 and size < 1:
            raise ValueError(f"{field}.{name} = {size}: a size is at least 1, or -1")


Axes = dict[str, int]

Rules = dict[str, str | list[str] | None]


class RolloutMesh(Section):
    """How the devices of a mesh are arranged while completions are sampled."""

    axes: Axes = Field(description="Axis -> size; as of the mesh.")
    rules: Rules = Field(default_factory=dict, description="As of the mesh, while sampling.")
    devices: int | None = Field(
        None,
        ge=1,
        description="So many of the devices only sample, the last ones of each process, while the "
        "others, which mesh.axes arranges, train. Needs phases_of_lag: 1. Default: all devices "
        "sample and train in turn.",
    )

    @model_validator(mode="after")
    def _sizes(self) -> RolloutMesh:
        _check_axes(self.axes, "axes")
        return self


class MeshSection(Section):
    """Named axes with sizes (one may be -1) and overrides of the logical-axis rules.

    In a config a name may stand for it: `mesh: fsdp` is configs/mesh/fsdp.yaml.
    """

    axes: Axes = Field(
        {"data": 1, "fsdp": -1, "tensor": 1},
        description="Axis -> size, the outermost first; -1: what is left of the devices.",
    )
    rules: Rules = Field(
        default_factory=dict, description="logical axis -> mesh axis, several, or null."
    )
    rollout: RolloutMesh | None = Field(
        None,
        description="Another arrangement of the devices to sample with, or a group of them that "
        "samples alone.",
    )
    cpu_devices: Annotated[int, Field(ge=1)] | Literal["cores"] = Field(
        1,
        description="Devices that a CPU counts as; `cores`: one per core (a power of two). "
        "XLA_FLAGS=--xla_force_host_platform_device_count=8 goes before it.",
    )

    @model_validator(mode="after")
    def _sizes(self) -> MeshSection:
        _check_axes(self.axes, "mesh.axes")
        return self
