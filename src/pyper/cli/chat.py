"""`pyper chat`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from pyper.cli.output import stdout
from pyper.cli.ranges import options_in_range


def chat(
    model: Annotated[Path, typer.Argument(help="A run folder or a mixture.")],
    expert: Annotated[
        str | None, typer.Option(help="Write with one expert: its name or number.")
    ] = None,
    system: Annotated[str, typer.Option(help="A message before the conversation.")] = "",
    mixing: Annotated[
        str | None, typer.Option(help="posterior, top1 or window instead of the saved mode.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Among the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Among the fewest that reach p.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="At least this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same conversation.")
    ] = None,
    resident: Annotated[
        int | None, typer.Option(min=1, help="Experts kept in memory at a time (default: all).")
    ] = None,
    weights: Annotated[
        Literal["int8", "fp8"] | None,
        typer.Option(help="Eight-bit weights: half the memory, and on a GPU half the time."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja template instead of the tokenizer's own.")
    ] = None,
    device: Annotated[str, typer.Option()] = "auto",
) -> None:
    """Talk to a model in the terminal; the colours show which expert wrote what.

    Messages may also come from a pipe, one per line. `/help` lists the commands.

    Example: `pyper chat runs/quickstart`
    """
    from pyper.generate import SamplingConfig
    from pyper.serve.chat_template import open_template
    from pyper.stages.chat import chat_in_terminal, new_seed
    from pyper.stages.write import open_model

    with options_in_range():
        sampling = SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=new_seed() if seed is None else seed,
        )
    opened = open_model(
        model,
        expert=None,
        mixing=mixing,
        resident=resident,
        device=device,
        narrow=weights,
    )
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    chat_in_terminal(
        opened,
        open_template(model, chat_template),
        sampling,
        stdout(),
        expert=expert,
        system=system,
        history=state / "pyper" / "chat-history",
    )
