"""`r1jax plan` and `plan-all`: a run's programs compiled for slices that need not be there."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from r1jax.commands.arguments import SLICE_HELP, ConfigName, Overrides, check_local_file
from r1jax.commands.console import make_console


def plan(
    config: ConfigName,
    overrides: Overrides = None,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", help=f"{SLICE_HELP} May be repeated."),
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="A TPU slice, or hosts of GPUs such as h200:8 and 4xh200:8, with the config as it "
            "is, without settings for it; may be repeated."
        ),
    ] = None,
    mesh: Annotated[
        list[str] | None,
        typer.Option(
            help="How to arrange its devices: fsdp=8,tensor=4, a name in configs/mesh, or an axis "
            "for all of them; may be repeated. Default: the config's."
        ),
    ] = None,
    fake: Annotated[
        int | None,
        typer.Option(
            "--fake-devices",
            min=1,
            help="Plan for this many devices that the CPU stands in for: without times.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A stage to plan; may be repeated. Default: all.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Compile with the least effort: up to four times as fast; memory and times come "
            "out within a few percent.",
        ),
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also run each program, with placeholder arguments: on this machine's devices, or "
            "on fake ones.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything to this file.", callback=check_local_file),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compile nothing: check config, mesh and batches, and estimate the memory. Needs "
            "no TPU compiler.",
        ),
    ] = False,
) -> None:
    """Compile a run's programs for a slice; print their memory, work, traffic and time.

    Needs no accelerator, weights or data. Times are those of a perfect machine. The exit status is
    1 where nothing fits.
    """
    from r1jax.config.load import ConfigError, load_config

    if bool(slices) + bool(topology) + (fake is not None) > 1:
        raise ConfigError(["--slice, --topology and --fake-devices: give one of them"])
    if measure and (slices or topology):
        raise ConfigError(["--measure needs devices that are there: give no --slice or --topology"])
    shaped = with_given_shapes(overrides or ())
    slice_names: Sequence[str | None] = slices or [None]
    settings = [load_config(config, shaped, name) for name in slice_names]

    from r1jax.config.slices import slice_name
    from r1jax.planner.check import check_slice, slice_or_stand_ins
    from r1jax.planner.plan import Case, PlanOptions, parse_mesh, plan_case
    from r1jax.planner.report import as_json, print_plans
    from r1jax.planner.topologies import attached, fake_devices, find_slice

    if fake is not None:
        targets = [fake_devices(fake)]
    else:
        find, names = slice_or_stand_ins if check else find_slice, slices or topology or ()
        targets = [find(slice_name(name)) for name in names] or [attached()]
    # A config for each slice, or one for all.
    pairs = zip(settings if slices else settings * len(targets), targets, strict=True)
    cases = [
        Case(each, target, parse_mesh(text, each.mesh))
        for each, target in pairs
        for text in mesh or ["config"]
    ]
    if check:
        for case in cases:
            typer.echo("\n".join(check_slice(case, only)))
        return
    console = make_console()
    with console.status("planning") as status:
        options = PlanOptions(only, quick=quick, measure=measure, progress=status.update)
        plans = [plan_case(case, options) for case in cases]
    if all(each.refused for each in plans):
        raise ValueError("\n".join(dict.fromkeys(each.refused for each in plans)))
    print_plans(plans, console)
    if out is not None:
        out.write_text(json.dumps(as_json(config, plans), indent=2) + "\n")
    if not any(each.fits for each in plans):
        raise typer.Exit(1)


def with_given_shapes(overrides: Sequence[str]) -> list[str]:
    """Overrides for a plan: a model's `config` takes the place of its `path`.

    So that a config of a model that cannot be reached is planned with its shape. Weights and
    tokenizer are not looked at.
    """
    shapes = [re.match(r"(model|models\..+)\.config=", override) for override in overrides]
    models = [shape[1] for shape in shapes if shape is not None]
    resets = ("path=null", "tokenizer=none")
    return [*overrides, *(f"{model}.{reset}" for model in models for reset in resets)]


def plan_all(
    configs: Annotated[
        list[str] | None,
        typer.Argument(help="Configs with slices. Default: all that come with r1jax."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the table to this file, after each slice.", callback=check_local_file
        ),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is compiled for later calls.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Begin no slice after this many.")
    ] = None,
) -> None:
    """Plan configs on every slice that they have settings for, quickly, as one Markdown table.

    The exit status is 1 where something does not fit.
    """
    from r1jax.config.load import load_config, slices_of
    from r1jax.config.packaged import packaged_configs
    from r1jax.planner.plan import Case, Plan, PlanOptions, distinct_stages, plan_case
    from r1jax.planner.report import as_markdown, has_margin
    from r1jax.planner.topologies import find_slice

    names = configs or [name for name in packaged_configs() if slices_of(name)]
    waiting = [(name, slice_name) for name in names for slice_name in slices_of(name)]
    if not waiting:
        raise ValueError(f"{', '.join(names)}: no config has settings for `slices`")
    until = None if minutes is None else time.monotonic() + 60 * minutes
    planned: list[tuple[str, Plan]] = []
    console = make_console()
    with console.status("planning") as status:
        while waiting and (until is None or time.monotonic() < until):
            name, slice_name = waiting.pop(0)
            settings = load_config(name, (), slice_name)
            options = PlanOptions(
                distinct_stages(settings),
                quick=True,
                cache=cache,
                progress=lambda line, name=name: status.update(f"{name}: {line}"),  # type: ignore[misc]
            )
            case = Case(settings, find_slice(slice_name), settings.mesh)
            planned.append((name, plan_case(case, options)))
            if out is not None:
                out.write_text(as_markdown(planned, waiting), encoding="utf-8")
    if out is None:
        table = as_markdown(planned, waiting)
        console.print(table, markup=False, highlight=False, soft_wrap=True)
    if not all(has_margin(each) for _, each in planned):
        raise typer.Exit(1)
