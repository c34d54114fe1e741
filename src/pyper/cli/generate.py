"""`pyper generate`."""

from typing import Annotated

import typer

from pyper.cli import writing
from pyper.cli.output import JsonOption, print_json, stdout
from pyper.cli.ranges import options_in_range


def generate(
    model: writing.Model,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help='Text to go on from. Repeatable. Default: "".'),
    ] = None,
    expert: writing.Expert = None,
    mixing: writing.Mixing = None,
    max_new_tokens: writing.MaxNewTokens = 128,
    temperature: writing.Temperature = writing.TEMPERATURE,
    top_k: writing.TopK = None,
    top_p: writing.TopP = writing.TOP_P,
    min_p: writing.MinP = 0.0,
    repetition_penalty: writing.RepetitionPenalty = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    show_experts: Annotated[
        bool, typer.Option("--show-experts", help="Colour the text by the expert that wrote it.")
    ] = False,
    resident: writing.Resident = None,
    speculate: writing.Speculate = False,
    draft: writing.Draft = None,
    weights: writing.Weights = None,
    device: writing.Device = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write text, streaming, from the mixture or one of its experts.

    Example: `pyper generate runs/quickstart -p "def main(" --show-experts`

    The same text sooner, where a small model's guesses come true:
    `pyper generate runs/large -p "Once upon a time" --draft runs/small`
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
        speculate=speculate,
        draft=draft,
    )
    prompts = prompt or [""]
    if as_json:
        print_json(write_json(opened, prompts, sampling))
    else:
        print_stream(opened, prompts, sampling, stdout(), show_experts=show_experts)
