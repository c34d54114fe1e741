"""`pyper doctor`."""

import typer

from pyper.cli.output import JsonOption, print_json, stdout


def doctor(as_json: JsonOption = False) -> None:
    """Check Python, torch, devices, memory, disk and extras; exits 1 when something is missing.

    Example: `pyper doctor`
    """
    from pyper.stages.doctor import examine, findings_table

    findings = examine()
    if as_json:
        print_json({"findings": [f.__dict__ for f in findings]})
    else:
        stdout().print(findings_table(findings))
    if any(f.ok is False for f in findings):
        raise typer.Exit(1)
