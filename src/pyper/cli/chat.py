"""`pyper chat`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pyper.cli import writing
from pyper.cli.output import stdout
from pyper.cli.ranges import options_in_range


def chat(
    model: writing.Model,
    expert: writing.Expert = None,
    system: Annotated[str, typer.Option(help="A message before the conversation.")] = "",
    mixing: writing.Mixing = None,
    max_new_tokens: writing.MaxNewTokens = 256,
    temperature: writing.Temperature = writing.TEMPERATURE,
    top_k: writing.TopK = None,
    top_p: writing.TopP = writing.TOP_P,
    min_p: writing.MinP = 0.0,
    repetition_penalty: writing.RepetitionPenalty = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same conversation.")
    ] = None,
    resident: writing.Resident = None,
    speculate: writing.Speculate = False,
    draft: writing.Draft = None,
    weights: writing.Weights = None,
    chat_template: writing.ChatTemplate = None,
    device: writing.Device = "auto",
) -> None:
    """Talk to a model in the terminal; the colours show which expert wrote what.

    Messages may also come from a pipe, one per line. `/help` lists the commands.

    Example: `pyper chat runs/quickstart`

    The same answers sooner, where a small model's guesses come true:
    `pyper chat runs/large --draft runs/small`
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
        speculate=speculate,
        draft=draft,
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
