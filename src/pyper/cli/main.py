"""The command line: one file per command, no logic. torch is imported when work starts."""

import sys
from typing import Annotated

import typer

from pyper import __version__
from pyper.cli import (
    assign,
    chat,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    merge,
    mix,
    prepare,
    quickstart,
    serve,
    train,
)
from pyper.cli.output import NO_ROOM, report_error, unwritten
from pyper.errors import PyperError

app = typer.Typer(
    name="pyper",
    help="Train, mix, evaluate and run tiny mixtures of experts.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

for command in (
    quickstart.quickstart,
    doctor.doctor,
    prepare.prepare,
    assign.assign,
    train.train,
    mix.mix,
    merge.merge,
    export.export,
    evaluate.evaluate,
    generate.generate,
    chat.chat,
    serve.serve,
    inspect.inspect,
):
    app.command()(command)
app.command("import")(import_.import_)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyper {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Train, mix, evaluate and run tiny mixtures of experts.

    Begin with `pyper quickstart`: three minutes on two CPU cores, nothing to download.
    """


def run() -> None:
    """Entry point. Exit codes: 0 done, 1 a PyperError, 2 wrong usage, 130/143 interrupted."""
    try:
        app()
    except PyperError as error:
        report_error(error)
        sys.exit(error.exit_code)
    except OSError as error:  # of a text or a table; files are named, and their errors our own
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        report_error(unwritten(error))
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    run()
