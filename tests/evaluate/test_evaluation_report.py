import json
import math
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from mixture.small_mixtures import NAMES
from mixture.small_scores import PREFIXES, TEMPERATURE, price_tensor, small_scores
from pyper.evaluate import Scores, domains_table, evaluation_report, losses_of_modes, results_table
from pyper.evaluate.mixture_losses import Rows

ARMS = {"control", "experts", "oracle", "routed", "posterior", "random_shards"}


def report_of(scores: list[Scores], *, prices: bool = True) -> dict[str, Any]:
    return evaluation_report(
        scores,
        experts=NAMES,
        temperature=TEMPERATURE,
        prefixes=PREFIXES,
        prices=price_tensor() if prices else None,
    )


def rows_of(scores: list[Scores]) -> list[Rows]:
    return [
        losses_of_modes(s, temperature=TEMPERATURE, prefixes=PREFIXES, prices=price_tensor())
        for s in scores
    ]


def test_the_report_has_the_documented_keys() -> None:
    report = report_of(small_scores())
    assert set(report) >= ARMS | {"tokens", "load", "bits_per_byte", "by_domain"}
    assert set(report["routed"]) == {"3", "6", "9"}
    assert set(report["posterior"]) == {"top1", "top2", "all"}
    assert len(report["experts"]) == len(report["load"]) == 4
    assert set(report["bits_per_byte"]) >= {"control", "routed_6"}
    assert set(report["by_domain"]) == {"verse", "prose"}
    for domain in report["by_domain"].values():
        assert set(domain) >= ARMS
    assert report["expert_names"] == list(NAMES)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_every_mean_is_over_tokens() -> None:
    scores = small_scores()
    report, rows = report_of(scores), rows_of(scores)

    def mean(parts: list[Any]) -> Any:
        return pytest.approx(float(torch.cat([p.flatten() for p in parts]).mean()), abs=1e-5)

    assert report["tokens"] == 8 * 16
    assert report["control"] == mean([r.control for r in rows])
    assert report["oracle"] == mean([r.oracle for r in rows])
    assert report["random_shards"] == mean([r.random_shards for r in rows])
    assert report["routed_with_prices"] == mean([r.routed_with_prices for r in rows])
    assert report["router_entropy"] == mean([r.entropy for r in rows])
    for e in range(4):
        assert report["experts"][e] == mean([r.experts[..., e] for r in rows])
    for n in PREFIXES:
        assert report["routed"][str(n)] == mean([r.routed[n] for r in rows])
    for name in ("top1", "top2", "all"):
        assert report["posterior"][name] == mean([r.posterior[name] for r in rows])
    for domain, row in zip(("verse", "prose"), rows, strict=True):
        assert report["by_domain"][domain]["oracle"] == mean([row.oracle])
        assert report["by_domain"][domain]["routed"]["6"] == mean([row.routed[6]])
    assert report["by_domain"]["verse"]["tokens"] == 5 * 16


def test_bits_per_byte_divide_all_bits_by_all_bytes() -> None:
    report = report_of(small_scores())
    n_bytes = 2.5 * 5 * 16 + 3.5 * 3 * 16
    assert report["bytes"] == n_bytes
    arms = {"control": report["control"], "routed_9": report["routed"]["9"]}
    arms |= {"oracle": report["oracle"], "posterior_all": report["posterior"]["all"]}
    for name, nats in arms.items():
        expected = nats * report["tokens"] / math.log(2) / n_bytes
        assert report["bits_per_byte"][name] == pytest.approx(expected, abs=1e-5)
        assert report["perplexity"][name] == pytest.approx(math.exp(nats), abs=1e-4)


def test_loads_are_shares_of_the_windows() -> None:
    scores = small_scores()
    report = report_of(scores)
    chosen = torch.cat([r.chosen for r in rows_of(scores)])
    expected = torch.bincount(chosen, minlength=4) / 8
    assert report["load"] == pytest.approx(expected.tolist(), abs=1e-4)
    own = torch.bincount(rows_of(scores)[1].chosen, minlength=4) / 3
    assert report["by_domain"]["prose"]["load"] == pytest.approx(own.tolist(), abs=1e-4)


def test_the_prefix_and_the_rest_add_up() -> None:
    scores = small_scores()
    report, rows = report_of(scores), rows_of(scores)
    for n in PREFIXES:
        parts = report["prefix_and_rest"][str(n)]
        for arm, whole in (("routed", report["routed"][str(n)]), ("control", report["control"])):
            together = n * parts["prefix"][arm] + (16 - n) * parts["rest"][arm]
            assert together / 16 == pytest.approx(whole, abs=2e-5)
        prefix = torch.cat([r.routed[n][:, :n].flatten() for r in rows]).mean()
        assert parts["prefix"]["routed"] == pytest.approx(float(prefix), abs=1e-5)


def test_what_was_not_run_is_null() -> None:
    report = report_of(small_scores(controls=False), prices=False)
    for key in ("control", "random_shards", "routed_with_prices"):
        assert report[key] is None
    assert report["bits_per_byte"]["control"] is None
    assert report["prefix_and_rest"]["6"]["rest"]["control"] is None
    assert report["by_domain"]["verse"]["control"] is None


def test_a_prefix_longer_than_the_windows_has_no_rest() -> None:
    report = evaluation_report(
        small_scores(), experts=NAMES, temperature=TEMPERATURE, prefixes=(64,), prices=None
    )
    parts = report["prefix_and_rest"]["64"]
    assert parts["rest"] == {"routed": None, "control": None}
    assert parts["prefix"]["routed"] == report["routed"]["64"] == report["posterior"]["all"]


def shown(table: Table, width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table)
    output = console.file
    assert isinstance(output, StringIO)
    return output.getvalue()


def test_the_results_table_has_a_line_for_every_arm_that_was_run() -> None:
    report = report_of(small_scores())
    body = [line for line in shown(results_table(report)).splitlines() if "│" in line]
    lines = {line.split("│")[1].strip(): line for line in body}
    expected = {
        "dense control": report["control"],
        "best single expert": min(report["experts"]),
        "random shards, ensemble": report["random_shards"],
        "best expert per window (oracle)": report["oracle"],
        "routed on 6 tokens": report["routed"]["6"],
        "routed at equal load (prices)": report["routed_with_prices"],
        "posterior, top-2": report["posterior"]["top2"],
        "posterior, all": report["posterior"]["all"],
    }
    for name, nats in expected.items():
        bits = nats * report["tokens"] / math.log(2) / report["bytes"]
        cells = [cell.strip() for cell in lines[name].split("│")[2:5]]
        assert cells == [f"{nats:.3f}", f"{nats - report['control']:+.3f}", f"{bits:.3f}"]
    bare = shown(results_table(report_of(small_scores(controls=False), prices=False)))
    assert "dense control" not in bare
    assert "prices" not in bare


def test_the_table_of_domains_shows_every_expert_and_the_middle_prefix() -> None:
    report = report_of(small_scores())
    lines = shown(domains_table(report)).splitlines()
    header = next(line for line in lines if line.split()[:1] == ["domain"])
    assert header.split() == ["domain", *NAMES, "control", "routed", "6", "top-2"]
    for domain, row in report["by_domain"].items():
        line = next(line for line in lines if line.split()[:1] == [domain])
        values = [*row["experts"], row["control"], row["routed"]["6"], row["posterior"]["top2"]]
        assert line.split()[1:] == [f"{x:.3f}" for x in values]
    without = shown(domains_table(report_of(small_scores(controls=False), prices=False)))
    assert "–" in without


def test_numbers_of_eight_experts_are_whole_in_eighty_columns() -> None:
    report = report_of(small_scores())
    report["expert_names"] = [f"expert-{e}" for e in range(8)]
    report["load"] = [0.125] * 8
    for row in report["by_domain"].values():
        row["experts"] = [2.125] * 8
    table = shown(domains_table(report), width=80)
    assert table.count("2.125") == 8 * len(report["by_domain"])
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80
