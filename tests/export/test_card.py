"""The model card: what is known, in tables that hold; what is not known is said."""

from dataclasses import replace

import pytest

from pyper import __version__
from pyper.export.card import CardFacts, DomainFacts, model_card

REPORT = {
    "tokens": 4096,
    "split": "test",
    "control": 2.5,
    "experts": [2.6, 2.7],
    "oracle": 2.2,
    "routed": {"32": 2.31},
    "posterior": {"top1": 2.3, "top2": 2.25, "all": None},
    "by_domain": {
        "law": {"tokens": 2048, "control": None, "experts": [2.0, 3.0], "posterior": {"top2": 1.9}},
    },
}
FACTS = CardFacts(
    name="mine",
    kind="a mixture of 2 language models",
    architecture="PyperMixtureForCausalLM",
    parameters=1_234_567,
    seq_len=1024,
    vocab_size=8192,
    dtype="bf16",
    mixing="at every token the 2 likeliest",
    needs_code=True,
    license_name="apache-2.0",
    domains=(DomainFacts("law", 10, 2000), DomainFacts("odd|name", 5, 500)),
    recipe={"optimizer": "muon"},
    evaluation=REPORT,
)


def rows_of(card: str) -> list[list[str]]:
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_data_recipe_and_evaluation_are_tables() -> None:
    rows = rows_of(model_card(FACTS))
    assert ["law", "10", "2,000"] in rows
    assert ["odd\\|name", "5", "500"] in rows
    assert ["**all**", "15", "2,500"] in rows
    assert ["optimizer", "`muon`"] in rows
    assert ["dense control", "2.500"] in rows
    assert ["posterior, top2", "2.250"] in rows
    assert ["law", "2,048", "–", "1.900"] in rows
    assert not any("posterior, all" in row for row in rows)
    assert ["made with", f"Pyper {__version__}"] in rows


def test_the_head_is_for_the_hub() -> None:
    head = model_card(FACTS).split("---")[1]
    assert 'license: "apache-2.0"' in head
    assert "library_name: transformers" in head
    assert "pipeline_tag: text-generation" in head
    assert "license" not in model_card(replace(FACTS, license_name=None)).split("---")[1]


@pytest.mark.parametrize("name", ['a": x', "b\nlibrary_name: evil", "ünïcode"])
def test_a_licence_cannot_break_out_of_the_head(name: str) -> None:
    lines = model_card(replace(FACTS, license_name=name)).split("---")[1].splitlines()
    assert sum(line.startswith("library_name") for line in lines) == 1
    assert sum(line.startswith("license") for line in lines) == 1


def test_loading_is_said_for_each_kind_of_folder() -> None:
    assert "trust_remote_code=True" in model_card(FACTS)
    stock = model_card(replace(FACTS, needs_code=False))
    assert "AutoModelForCausalLM.from_pretrained(folder)" in stock
    assert "trust_remote_code" not in stock
    gguf = model_card(replace(FACTS, gguf_file="mine-f16.gguf"))
    assert "llama-cli -m mine-f16.gguf" in gguf
    assert "library_name: gguf" in gguf


def test_what_is_not_known_is_said() -> None:
    bare = replace(
        FACTS, license_name=None, domains=(), recipe={}, evaluation=None, notes=("Mind this.",)
    )
    card = model_card(bare)
    assert "Not stated." in card
    assert "None is on record" in card
    assert "What it was trained on is not recorded here." in card
    assert "- Mind this." in card
    assert "## Training data" not in card


def test_one_model_has_one_loss() -> None:
    one = {
        **REPORT,
        "experts": [2.6],
        "by_domain": {"law": {"tokens": 9, "control": 2.5, "experts": [2.4]}},
    }
    rows = rows_of(model_card(replace(FACTS, evaluation=one, mixing="")))
    assert ["this model", "2.600"] in rows
    assert ["law", "9", "2.500", "2.400"] in rows
    assert not any("oracle" in cell for row in rows for cell in row)


def test_a_control_is_spoken_of_where_there_is_one() -> None:
    assert "dense control had" in model_card(FACTS)
    card = model_card(replace(FACTS, evaluation=REPORT | {"control": None}))
    assert "dense control had" not in card


def test_a_model_with_a_chat_template_is_not_called_a_base_model() -> None:
    assert "base model" in model_card(FACTS)
    card = model_card(replace(FACTS, has_chat_template=True))
    assert "base model" not in card
    assert "apply_chat_template" in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
