"""`pyper serve`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli import writing
from pyper.cli.output import stdout


def serve(
    model: writing.Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the API (default: the folder's).")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file that holds the key clients must send.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="The key itself, which others can see in `ps`; or set PYPER_API_KEY."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which clients know this server. Repeatable."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Sequences written side by side.")] = 64,
    queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; one more is answered 429.")
    ] = 64,
    cache_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of keys and values kept, over all experts and sequences."),
    ] = None,
    resident: writing.Resident = None,
    mixing: writing.Mixing = None,
    chat_template: writing.ChatTemplate = None,
    shutdown_seconds: Annotated[
        float, typer.Option(help="Time, 0 or more, for running requests once it is told to stop.")
    ] = 30,
    compile_: Annotated[
        bool, typer.Option("--compile", help="On a GPU: compile decoding; the start takes longer.")
    ] = False,
    speculate: writing.Speculate = False,
    draft: writing.Draft = None,
    weights: writing.Weights = None,
    device: writing.Device = "auto",
) -> None:
    """Serve a model over HTTP, as OpenAI's interface, with a page to chat at `/`.

    Example: `pyper serve runs/quickstart --port 8000`
    """
    from pyper.generate import EngineLimits
    from pyper.serve.settings import Limits, ServeSettings
    from pyper.stages.serve import name_of, read_key, serve_model

    settings = ServeSettings(
        name=name or name_of(model),
        host=host,
        port=port,
        api_key=read_key(api_key_file, api_key),
        allowed_hosts=tuple(allow_host or ()),
        limits=Limits(queue=queue, shutdown_seconds=shutdown_seconds),
    )
    limits = EngineLimits(
        max_running=max_running,
        cache_tokens=cache_tokens or EngineLimits.cache_tokens,
        compiled=compile_,
    )
    serve_model(
        model,
        settings,
        limits,
        stdout(),
        mixing=mixing,
        resident=resident,
        device=device,
        narrow=weights,
        speculate=speculate,
        draft=draft,
        chat_template=chat_template,
    )
