"""`pyper generate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pyper.cli.output import JsonOption, print_json, stdout
from pyper.cli.ranges import options_in_range


def generate(
    model: Annotated[Path, typer.Argument(help="A run folder or a mixture.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help='Text to go on from. Repeatable. Default: "".'),
    ] = None,
    expert: Annotated[
        str | None, typer.Option(help="Write with one expert: its name or number.")
    ] = None,
    mixing: Annotated[
        str | None, typer.Option(help="posterior, top1 or window instead of the saved mode.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Among the fewest that reach p.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="At least this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Colour the text by the expert that wrote it.")
    ] = False,
    resident: Annotated[
        int | None, typer.Option(min=1, help="Experts kept in memory at a time (default: all).")
    ] = None,
    weights: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Eight-bit weights: half the memory, and on a GPU half the time."),
    ] = None,
    device: Annotated[str, typer.Option()] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write text, streaming, from the mixture or one of its experts.

    Example: `pyper generate runs/quickstart -p "def main(" --show-experts`
    """
    from pyper.generate import SamplingConfig
    from pyper.stages.write import open_model, print_stream, write_json

    with options_in_range():
        sampling = SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
        )
    opened = open_model(
        model,
        expert=expert,
        mixing=mixing,
        resident=resident,
        device=device,
        narrow=weights,
    )
    prompts = prompt or [""]
    if as_json:
        print_json(write_json(opened, prompts, sampling))
    else:
        print_stream(opened, prompts, sampling, stdout(), show_experts=show_experts)
