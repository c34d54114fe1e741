"""`pyper import`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.output import JsonOption, print_json, stderr, stdout


def import_(
    source: Annotated[
        Path, typer.Argument(help="Folder with config.json, *.safetensors, tokenizer.json.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new model.")],
    dtype: Annotated[
        str, typer.Option(help="keep (as the weights are), bf16, fp16 or fp32.")
    ] = "keep",
    bos: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="Token that begins documents; default: the model's own."
        ),
    ] = None,
    ignore_key: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Pass over a key of config.json that Pyper refuses."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare logits with transformers afterwards.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take over a model from Hugging Face: Llama, Mistral, Qwen 2 and 3, SmolLM, OLMo 2, Arcee.

    The result writes, serves, and is a start for training: `train.start_from`. Anything in the
    model that would come out differently here is refused by name; nothing is downloaded.

    Example: `pyper import downloads/SmolLM2-135M -o seeds/smol --check`
    """
    from pyper.stages.import_model import ImportOptions, import_model, import_table

    options = ImportOptions(dtype, bos, tuple(ignore_key or ()), check)
    result = import_model(source, output, options, stderr())
    if as_json:
        print_json(result)
    else:
        stdout().print(import_table(result))
