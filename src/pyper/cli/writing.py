"""Options of the commands that write text: the model, who guesses for it, how tokens are drawn."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[Path, typer.Argument(help="A run folder or a mixture.")]
Expert = Annotated[str | None, typer.Option(help="Write with one expert: its name or number.")]
Mixing = Annotated[
    str | None, typer.Option(help="posterior, top1 or window instead of the saved mode.")
]
Resident = Annotated[
    int | None, typer.Option(min=1, help="Experts kept in memory at a time (default: all).")
]
Weights = Annotated[
    Literal["int8", "fp8"] | None,
    typer.Option(help="Eight-bit weights: half the memory, and a GPU writes single texts faster."),
]
Speculate = Annotated[
    bool, typer.Option("--speculate", help="Guess what repeats, while that is faster.")
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|router",
        help="A small model of the same tokenizer guesses, while that is faster: its folder, "
        "or the mixture's own `lm` router.",
    ),
]
ChatTemplate = Annotated[
    Path | None, typer.Option(help="A Jinja template instead of the tokenizer's own.")
]
Device = Annotated[str, typer.Option()]

MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(help="Among the k likeliest.")]
TopP = Annotated[float, typer.Option(help="Among the fewest that reach p.")]
MinP = Annotated[float, typer.Option(help="At least this share of the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option()]

# Defaults of the commands; `SamplingConfig` by itself draws among all tokens.
TEMPERATURE = 0.8
TOP_P = 0.95
