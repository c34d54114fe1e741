"""`pyper prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.exclusive import refuse_beside
from pyper.cli.output import JsonOption, print_json, stderr, stdout
from pyper.cli.ranges import settings_of


def prepare(
    context: typer.Context,
    sources: Annotated[
        list[Path], typer.Argument(help="Folders, files, or data sets: `hf:owner/name`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="`bpe` (default), `bytes`, or a tokenizer.json.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Entries of a trained BPE (4096).")] = None,
    valid_fraction: Annotated[
        float | None, typer.Option(help="Share of the documents held out for validation (0.05).")
    ] = None,
    test_fraction: Annotated[
        float | None,
        typer.Option(help="Share of the documents held out for the final numbers (0.05)."),
    ] = None,
    min_chars: Annotated[int | None, typer.Option(help="Leave out shorter documents.")] = None,
    split_by: Annotated[
        str | None, typer.Option(help="How text files are cut: `document`, `blank-line` or `file`.")
    ] = None,
    text_key: Annotated[
        str | None, typer.Option(help="The key or column of the text (`text`).")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="What is where: `text=body,domain=source,messages=chat`."),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", help="Keep only these: `chars > 200 and lang == 'en'`. Repeatable."
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja template for records with `messages` (the tokenizer's, or plain)."
        ),
    ] = None,
    strict_tokenizer: Annotated[
        bool, typer.Option("--strict-tokenizer", help="Refuse a tokenizer that changes text.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Threads that tokenize (one per core); same output.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn text into token shards.

    A folder's sub-folders and files are its domains; files named train, valid and test keep that
    split. Reads .txt, .jsonl, .csv, .tsv (also .gz .xz .zst), .parquet, .arrow, .feather, what
    `datasets` saved, and any other UTF-8 text. Of chats, the answers are learned.

    Example: `pyper prepare texts/ -o data/mine --vocab-size 8192`
    """
    if tokenizer not in (None, "bpe"):
        refuse_beside(context, f"--tokenizer {tokenizer}", "vocab_size")
    given = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "valid_fraction": valid_fraction,
        "test_fraction": test_fraction,
        "min_chars": min_chars,
        "split_by": split_by,
        "text_key": text_key,
        "columns": columns,
        "filter": filters,
        "chat_template": chat_template,
        "strict_tokenizer": strict_tokenizer or None,
        "workers": workers,
    }
    # Imported here: pydantic would double the time of `pyper --help`.
    from pyper.config import PrepareConfig
    from pyper.stages.prepare import data_summary, data_table, prepare_with_progress

    config = settings_of(PrepareConfig, {k: v for k, v in given.items() if v is not None})
    if "text" in config.columns:
        refuse_beside(context, "--columns text=…", "text_key")
    manifest = prepare_with_progress(sources, output, config, stderr())
    if as_json:
        print_json(data_summary(manifest, output))
    else:
        stdout().print(data_table(manifest, output))
