"""`r1jax sample` and `search`: a model's answers to one prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from r1jax.commands.arguments import Model, Overrides, check_local_file
from r1jax.commands.console import write_model_text


def sample(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Default: read from standard input.")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Completions; the first is streamed.")
    ] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Default: 1024, or fewer where the model's positions end."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(help="Above 0, at most 1.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="0: off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0: off; below 1.")] = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends a completion; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    template: Annotated[
        Literal["chat", "r1_zero", "plain"],
        typer.Option(help="chat: the tokenizer's own. plain: for base models."),
    ] = "chat",
    speculative: Annotated[
        bool, typer.Option(help="Draft with the model's module for multi-token prediction: faster.")
    ] = False,
) -> None:
    """Print a model's completions of a prompt as they are made."""
    prompt = _prompt_of(prompt)

    from pydantic import ValidationError

    from r1jax.config.load import ConfigError
    from r1jax.settings.sampling import SamplingSection

    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    try:
        sampling = SamplingSection(**given, stop=stop or [], speculative=speculative)
    except ValidationError as error:
        raise ConfigError(
            [
                f"--{str(each['loc'][0]).replace('_', '-')} = {each['input']!r}: "
                + each["msg"].removeprefix("Input ").removeprefix("String ")
                for each in error.errors()
            ]
        ) from None
    from r1jax.pretrained import stream_completions

    rest = [""] * samples
    _heading(0, samples)
    for index, text in stream_completions(
        model, prompt, sampling, samples, max_new_tokens, seed, template
    ):
        # Several streams at once cannot be read; the others are kept until the first is over.
        if index == 0:
            write_model_text(text)
        else:
            rest[index] += text
    write_model_text("\n")
    for index in range(1, samples):
        _heading(index, samples)
        write_model_text(rest[index] + "\n")


def search(
    model: Model,
    overrides: Overrides = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Default: read from standard input.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Where the search is described; default: the run's.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Which stage with search; default: the config's last.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A file of JSON lines, to which the tree is added; default: searches.jsonl in the "
            "run's directory, or beside the caller.",
            callback=check_local_file,
        ),
    ] = None,
) -> None:
    """Search the solution of a prompt as a config's stage does, print it and keep the tree."""
    from r1jax.config.load import ConfigError, load_config
    from r1jax.evaluation.run_directory import split_reference

    directory, _ = split_reference(model)
    described = config or (None if directory is None else directory / "config.yaml")
    if described is None:
        needed = "say with --config FILE how to search"
        raise ConfigError([f"{model} is not a run's directory: {needed}"])
    settings = load_config(described, overrides or ())
    prompt = _prompt_of(prompt)

    from r1jax import recipe
    from r1jax.files import encode_line
    from r1jax.run.checkpointed import find_model

    settings, chosen = recipe.search_config(settings, find_model(model).path, stage)
    text, tree = recipe.search_prompt(settings, chosen, prompt, directory)
    write_model_text(text + "\n")
    out = out or (directory or Path()) / "searches.jsonl"
    with out.open("ab") as file:
        file.write(encode_line(tree))
    node = tree["nodes"][tree["solutions"][0]]
    value = node["mean_value"] if node["value"] is None else node["value"]
    line = f"{node['state']}, value {value}; {tree['generated_tokens']} tokens generated, "
    line += f"{len(tree['nodes']) - 1} steps; the tree is added to {out}"
    typer.secho(line, dim=True, err=True)


def _prompt_of(given: str | None) -> str:
    """A prompt that was given, or that is read from standard input."""
    if given is None:
        if sys.stdin.isatty():
            typer.secho("prompt, then Ctrl-D:", dim=True, err=True)
        given = sys.stdin.read().rstrip("\n")
    if not given:
        raise ValueError("the prompt is empty: give --prompt TEXT or text on standard input")
    return given


def _heading(index: int, samples: int) -> None:
    if samples > 1:
        typer.secho(f"--- {index + 1} of {samples} ---", dim=True)
