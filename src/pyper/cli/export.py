"""`pyper export`."""

from pathlib import Path
from typing import Annotated

import typer

from pyper.cli.output import JsonOption, print_json, stderr, stdout


def export(
    model: Annotated[Path, typer.Argument(help="A run, a mixture, a merged or imported model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    to: Annotated[str, typer.Option(help="hf (for transformers) or gguf (for llama.cpp).")] = "hf",
    expert: Annotated[
        str | None, typer.Option(help="One expert alone: its name or number.")
    ] = None,
    mixing: Annotated[
        str | None, typer.Option(help="posterior or top1 instead of the mixture's saved mode.")
    ] = None,
    architecture: Annotated[
        str,
        typer.Option(
            help="stock: one that transformers has; pyper: with a modelling file; auto: stock "
            "where that is exact."
        ),
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16 (default: as it is saved).")
    ] = None,
    shard_gb: Annotated[
        float | None, typer.Option(help="Largest file of weights, in GB (5); hf only.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="For the model card, e.g. apache-2.0.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Load the result again and compare it with the model.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a model for other programs: weights, tokenizer, model card.

    A mixture comes with a modelling file that needs transformers alone; one expert has a stock
    architecture where one computes exactly the same.

    Example: `pyper export runs/quickstart --to hf -o exported/quickstart`
    """
    from pyper.stages.export import export_model, export_table
    from pyper.stages.export_source import ExportOptions

    options = ExportOptions(
        to=to,
        expert=expert,
        mixing=mixing,
        architecture=architecture,
        dtype=dtype,
        shard_gb=shard_gb,
        license_name=license_name,
        check=check,
    )
    result = export_model(model, output, options, stderr())
    if as_json:
        print_json(result)
    else:
        stdout().print(export_table(result))
