"""What a run would take: parameters, shardings and memory, without compiling anything."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax

from r1jax.config.lineage import edges
from r1jax.config.run_config import RunConfig
from r1jax.files import JsonObject
from r1jax.models import declare
from r1jax.models.parameters import abstract_weights, is_spec
from r1jax.planner.memory import free_here, planning_of, sizes_of, too_large
from r1jax.planner.topologies import Slice
from r1jax.programs import StagePrograms
from r1jax.programs.program import bytes_by_kind, bytes_on_device
from r1jax.run.models import LanguageModel, Layouts
from r1jax.run.resolve import check, load_functions, resolve
from r1jax.settings.stage import Stage


def describe(
    config: RunConfig, target: Slice | None = None, stages: Sequence[Stage] | None = None
) -> JsonObject:
    """What `--dry-run` shows: parameters, the sharding of each weight, a memory estimate, and lines
    about rows whose reference answers cannot be read and about the most that a step may take.
    `too_large` has the stages for which the memory does not suffice; `fullest` the program that
    needs the most, if there is one, and `free` what a device has, if that is known.

    Each stage has the largest that its programs have in memory at once, beside the weights.

    target: the slice, which need not be there; default: the devices of this machine.
    stages: those that will run, of whose models and programs the memory is; default: all.
    """
    chosen = config.stages if stages is None else stages
    free: float | None
    if target is None:
        run, free = resolve(config), free_here()
        kind = jax.devices()[0].device_kind
    else:
        run, free = resolve(config, target.devices, target.stands_for), target.hbm
        kind = target.name
    notes = check(run)
    planning = planning_of(run)
    weights: list[JsonObject] = []
    memory: list[JsonObject] = []
    sizes: dict[str, int] = {}
    used = _models_of(config, chosen)
    for name, model in run.models.by_name.items():
        if name not in used:
            continue
        prefix = f"{name}." if len(run.models.by_name) > 1 else ""
        rows = _weights(model, prefix)
        weights += rows
        sizes[name] = sum(row["bytes"] for row in rows)
        memory.append({"what": f"{prefix}weights", "bytes": sizes[name]})
    fullest: JsonObject | None = None
    for stage in chosen:
        called = load_functions(stage).programs(stage, planning)
        for program in called.programs:
            needed = sizes_of(program).total()
            if fullest is None or needed > fullest["bytes"]:
                fullest = {"what": f"{program.name} of {stage.name}", "bytes": needed}
        memory += stage_memory(stage, called, sizes[config.model_of(stage.name)], run.layouts)
        notes += [f"{stage.name}: {line}" for line in called.limits]
    return {
        "parameters": sum(math.prod(weight["shape"]) for weight in weights),
        "weights": weights,
        "memory": memory,
        "notes": notes,
        "too_large": too_large(chosen, planning, free),
        "fullest": fullest,
        "free": free,
        "devices": f"{run.layouts.devices} x {kind}, mesh {meshes_of(run.layouts)}",
    }


def _models_of(config: RunConfig, stages: Sequence[Stage]) -> set[str]:
    """The models whose weights the stages start from or read."""
    names = {stage.name for stage in stages}
    read = [edge for edge in edges(config) if edge.target in names and edge.gives != "data"]
    return {config.model_of(name) for name in [*names, *(edge.source for edge in read)]}


def meshes_of(layouts: Layouts) -> str:
    """The axes of the mesh with their sizes, and of that for sampling where it is another."""
    training, rollout = (
        ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
        for layout in layouts
    )
    if layouts.apart:
        sample = layouts.rollout.mesh.size
        return f"{training}; beside it {sample} devices sample, mesh {rollout}"
    same = layouts.training.mesh == layouts.rollout.mesh
    return training if same else f"{training}; while sampling {rollout}"


def _weights(model: LanguageModel, prefix: str) -> list[JsonObject]:
    named = jax.tree.leaves_with_path(abstract_weights(model.decoder))
    specs = jax.tree.leaves(declare(model.decoder.config), is_leaf=is_spec)
    return [
        {
            "name": prefix + jax.tree_util.keystr(path, simple=True, separator="."),
            "shape": leaf.shape,
            "dtype": leaf.dtype.name,
            "axes": spec.axes,
            "sharding": str(leaf.sharding.spec),
            "bytes": bytes_on_device(leaf),
        }
        for (path, leaf), spec in zip(named, specs, strict=True)
    ]


# By kind of memory, in the order of the lines; others follow under the names that programs give.
_LABELS = {
    "gradients": "gradients",
    "optimizer": "optimizer moments",
    "reference": "reference policy",
    "sampler's weights": "sampler's weights",
    "cache": "key-value cache",
    "slots": "state of the slots",
    "activations": "activations",
    "a chunk of logits": "a chunk of logits",
}
# The models' weights have lines of their own, and token ids are small.
_UNLISTED = ("weights", "policy", "batch")


def stage_memory(
    stage: Stage, called: StagePrograms, weights: int, layouts: Layouts
) -> list[JsonObject]:
    """What a stage has in memory beside its model's weights, which are `weights` bytes."""
    groups: dict[str, dict[str, int]] = {"": {}}
    sampling = set(layouts.rollout.mesh.devices.flat) if layouts.apart else set()
    for program in called.programs:
        sizes = bytes_by_kind(program.resident, program.arguments)
        samples = not sampling.isdisjoint(program.devices)
        largest = groups.setdefault(" (devices that sample)" if samples else "", {})
        if "policy" in sizes or samples or ("cache" in sizes and sizes["weights"] != weights):
            sizes["sampler's weights"] = sizes["weights"]
        for kind, size in {**program.temporaries, **sizes}.items():
            largest[kind] = max(size, largest.get(kind, 0))
    return [
        {"what": f"{stage.name}: {_LABELS.get(kind, kind)}{group}", "bytes": largest[kind]}
        for group, largest in groups.items()
        for kind in [*_LABELS, *(kind for kind in largest if kind not in _LABELS)]
        if largest.get(kind) and kind not in _UNLISTED
    ]
