"""`pyper merge`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.exclusive import refuse_beside, refuse_without
from pyper.cli.output import JsonOption, print_json, stderr, stdout


def merge(
    context: typer.Context,
    run_file: Annotated[Path, typer.Argument(help="Run folder; with --add, a merged model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the merged model.")],
    routing: Annotated[
        str, typer.Option(help="token_choice, expert_choice, threshold or capped.")
    ] = "token_choice",
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token under token choice.")] = 2,
    router: Annotated[str, typer.Option(help="ridge, means or random.")] = "ridge",
    attention: Annotated[
        str, typer.Option(help="average, or soft: keep all attentions, softly mixed.")
    ] = "average",
    average: Annotated[
        bool, typer.Option("--average", help="One dense model of mean weights instead.")
    ] = False,
    upcycle: Annotated[
        int | None, typer.Option(min=2, help="Copy the dense control this many times instead.")
    ] = None,
    noise: Annotated[float, typer.Option(help="On upcycled copies, 0 or more, e.g. 0.01.")] = 0.0,
    add: Annotated[
        str | None,
        typer.Option(metavar="RUN:EXPERT", help="Add a run's expert to a merged model."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda …; auto: the run's own, with --add any GPU.")
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make one sparse model of a run's experts: their feed-forwards become experts of each layer.

    The rest is averaged, which needs experts that branched from one seed. Tune the result with a
    run of its own: `pyper train tune.toml --set train.start_from=models/merged`.

    Example: `pyper merge runs/quickstart -o models/merged`
    """
    _refuse_what_would_not_count(context, routing, average=average, upcycle=upcycle, add=add)
    from pyper.stages.merge_command import MergeOptions, merge_command, merge_table

    options = MergeOptions(
        routing=routing,
        top_k=top_k,
        router=router,
        attention=attention,
        average=average,
        upcycle=upcycle,
        noise=noise,
        add=add,
        device=device,
    )
    result = merge_command(run_file, output, options, stderr())
    if as_json:
        print_json(result)
    else:
        stdout().print(merge_table(result))


_OF_ROUTING = ("routing", "top_k", "router", "attention")


def _refuse_what_would_not_count(
    context: typer.Context, routing: str, *, average: bool, upcycle: int | None, add: str | None
) -> None:
    if add is not None:
        refuse_beside(context, "--add", *_OF_ROUTING, "average", "upcycle", "noise")
    if average:
        refuse_beside(context, "--average", *_OF_ROUTING, "upcycle", "noise")
    if upcycle is not None:
        refuse_beside(context, "--upcycle", "router")
    else:
        refuse_without(context, "--upcycle", "noise")
    if routing != "token_choice":
        refuse_beside(context, f"--routing {routing}", "top_k")
