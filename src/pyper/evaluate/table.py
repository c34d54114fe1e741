"""The results as a table for people."""

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def results_table(report: dict[str, Any]) -> Table:
    """One line per arm: nats per token, difference to the control, bits per byte, perplexity."""
    table = Table(title=f"held-out loss over {report['tokens']:,} tokens")
    for name in ("arm", "nats/token", "vs control", "bits/byte", "perplexity", "runs"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    per_byte = report["bits_per_byte"]["oracle"] / report["oracle"]
    for name, loss, runs, style in _arms(report):
        if loss is None:
            continue
        gap = "" if report["control"] is None else f"{loss - report['control']:+.3f}"
        perplexity = math.exp(loss)
        table.add_row(
            name,
            f"{loss:.3f}",
            gap,
            f"{loss * per_byte:.3f}",
            f"{perplexity:.2f}",
            runs,
            style=style,
        )
    return table


def _arms(report: dict[str, Any]) -> list[tuple[str, float | None, str, str]]:
    best = min(report["experts"])
    if len(report["experts"]) == 1:
        return _arms_of_one_model(report)
    arms = [
        ("dense control", report["control"], "1", "bold"),
        ("best single expert", best, "1", "dim"),
        ("random shards, ensemble", report["random_shards"], "all", "dim"),
        ("best expert per window (oracle)", report["oracle"], "1", "dim"),
    ]
    arms += [
        (f"routed on {n} tokens", loss, "1", "green" if n == "32" else "")
        for n, loss in report["routed"].items()
    ]
    arms.append(("routed at equal load (prices)", report["routed_with_prices"], "1", ""))
    arms += [
        (f"posterior, {'all' if k == 'all' else 'top-' + k[3:]}", loss, _runs(k), "green")
        for k, loss in report["posterior"].items()
    ]
    return arms


def _arms_of_one_model(report: dict[str, Any]) -> list[tuple[str, float | None, str, str]]:
    """One model has no modes; a routed one shows what expert choice would have claimed."""
    arms: list[tuple[str, float | None, str, str]] = [
        ("dense control", report["control"], "1", "bold"),
        (report["expert_names"][0], report["experts"][0], "1", "green"),
    ]
    for routing in report.get("routing", []):
        name = "… by expert choice (sees the future)"
        arms.append((name, routing["teacher_forced"], "1", "dim"))
    return arms


def _runs(k: str) -> str:
    return "all" if k == "all" else k[3:]


def domains_table(report: dict[str, Any]) -> Table:
    """Expert × domain: the loss of every expert on every domain, its home in bold."""
    table = Table(
        title="loss by domain (rows) and expert (columns), nats/token",
        box=SIMPLE_HEAD,
        padding=0,  # eight experts fit 80 columns
        pad_edge=False,
    )
    table.add_column("domain", overflow="fold")
    middle = list(report["routed"])[len(report["routed"]) // 2]
    several = len(report["experts"]) > 1
    modes = ("control", f"routed {middle}", "top-2") if several else ("control",)
    for name in (*report["expert_names"], *modes):
        table.add_column(name, justify="right", overflow="fold", min_width=len("0.000"))
    for domain, row in report["by_domain"].items():
        best = min(row["experts"])
        cells = [f"[bold]{x:.3f}[/]" if x == best else f"{x:.3f}" for x in row["experts"]]
        extra = [row["control"], row["routed"][middle], row["posterior"]["top2"]][: len(modes)]
        table.add_row(domain, *cells, *["–" if x is None else f"{x:.3f}" for x in extra])
    load = [f"{share:.0%}" for share in report["load"]]
    table.add_row("load", *load, *[""] * len(modes), style="dim")
    return table
