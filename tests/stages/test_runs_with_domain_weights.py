"""`data.weights`: what they do to epochs, to experts, to a plan, and when they are wrong."""

import io
import tomllib
from typing import Any

import pytest
from rich.console import Console
from run_files import Open

from pyper.config import RunConfig, parse_run
from pyper.data import effective_tokens
from pyper.errors import ConfigError, DataError
from pyper.stages.assign import assign
from pyper.stages.context import Context
from pyper.stages.plan import plan, plan_table
from pyper.stages.toml import to_toml
from pyper.stages.train import Unit, _data_of, budget_of

WEIGHTS = "data.weights={ sums = 2.0, tales = 0.5 }"


def by_folder(open_new: Open, name: str, *settings: str, **others: Any) -> Context:
    return open_new(name, "mixture.assign=folder", "train.epochs=6", *settings, **others)


def test_epochs_are_those_of_the_weighted_mixture(open_new: Open) -> None:
    plain, weighed = by_folder(open_new, "plain"), by_folder(open_new, "weighed", WEIGHTS)
    documents = plain.data.documents("train")
    budgets = [budget_of(context, assign(context)) for context in (plain, weighed)]
    ratio = effective_tokens(documents, {"sums": 2.0, "tales": 0.5}) / documents.n_tokens
    assert budgets[1].total == pytest.approx(budgets[0].total * ratio, abs=3)
    sums, tales = budgets[1].experts[0] / budgets[0].experts[0], budgets[1].experts[1]
    assert sums == pytest.approx(2, rel=0.1)
    assert tales == pytest.approx(budgets[0].experts[1] / 2, rel=0.2)


def test_an_expert_may_weigh_for_itself(open_new: Open) -> None:
    own = [{"name": "sums", "data": {"weights": {"sums": 3.0}}}]
    context = by_folder(open_new, "own", WEIGHTS, expert=own)
    assigned = assign(context)
    assert _data_of(context, assigned, Unit("expert", 0)).domain_weights == {"sums": 3.0}
    for unit in (Unit("expert", 1), Unit("control"), Unit("seed"), Unit("random-shard", 0)):
        weights = _data_of(context, assigned, unit).domain_weights
        assert weights == {"sums": 2.0, "tales": 0.5}
    plain = context.data.documents("train", ["sums"]).n_tokens
    assert assigned.train_tokens(context)[0] == 3 * plain


def test_held_out_text_is_not_weighed(open_new: Open) -> None:
    context = by_folder(open_new, "valid", WEIGHTS)
    data = _data_of(context, assign(context), Unit("control"))
    assert data.valid.n_documents == context.data.documents("valid").n_documents


def test_a_plan_shows_what_an_epoch_reads(open_new: Open) -> None:
    run = by_folder(open_new, "plan", WEIGHTS).run
    planned = plan(run)
    for domain, weight in (("sums", 2.0), ("tales", 0.5)):
        row = planned["domains"][domain]
        assert row["effective"] == round(row["tokens"] * weight)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(plan_table(planned))
    said = console.export_text()
    assert f"x 2 = {planned['domains']['sums']['effective']:,}" in said


def test_an_unknown_domain_gets_a_suggestion(open_new: Open) -> None:
    with pytest.raises(ConfigError, match=r"`data\.weights`: there is no domain `tails`") as caught:
        by_folder(open_new, "typo", "data.weights={ tails = 2 }")
    assert "tales" in caught.value.hint
    own = [{"name": "sums", "data": {"weights": {"sum": 3.0}}}]
    with pytest.raises(ConfigError, match=r"`expert.sums.data.weights`.*`sum`"):
        by_folder(open_new, "typo", expert=own)


@pytest.mark.parametrize("weight", [0, 0.001])
def test_weights_that_leave_an_expert_nothing_are_refused_before_training(
    open_new: Open, weight: float
) -> None:
    own = [{"name": "tales", "data": {"weights": {"tales": weight}}}]
    context = by_folder(open_new, "nothing", expert=own)
    with pytest.raises(DataError, match=r"expert `tales` would get \d+ training tokens an epoch"):
        budget_of(context, assign(context))
    nothing = by_folder(open_new, "none", "data.weights={ sums = 0, tales = 0 }")
    with pytest.raises(DataError, match="would get 0 training tokens"):
        plan(nothing.run)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"weights": {"law": -1}}}, "data.weights.law"),
        ({"data": {"weights": {"law": "much"}}}, "data.weights.law"),
        ({"expert": [{"name": "law", "weights": {"law": 2.0}}]}, "numbers of a model"),
        ({"expert": [{"name": "law", "data": {"seq_len": 3}}]}, "seq_len"),
    ],
)
def test_weights_of_another_form_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run({"train": {"epochs": 1}} | values)


def test_a_resolved_run_file_keeps_weights_of_domains_with_any_name() -> None:
    weights = {"law": 2.0, "C++ headers": 0.5, "a.b": 1.5, 'said "so"': 0.0, "é": 3.0}
    expert = {"name": "law", "data": {"weights": weights}}
    values = {"train": {"epochs": 1}, "data": {"weights": weights}, "expert": [expert]}
    run = parse_run(values)
    written = to_toml(run.model_dump(mode="json", exclude_none=True))
    read: RunConfig = parse_run(tomllib.loads(written))
    assert read == run
    assert read.domain_weights(0, "law") == weights
