import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyper.config import PrepareConfig
from pyper.data.readers import Document
from pyper.data.sample import TextSample
from pyper.data.splitting import DomainPlan, cut_document, digest_of, plan_domain

CONFIG = PrepareConfig(valid_fraction=0.1, test_fraction=0.1)


def observed(texts: list[str]) -> DomainPlan:
    plan = plan_domain({None}, CONFIG)
    for text in texts:
        plan.observe(Document(text, "d", None, ""), digest_of(text))
    return plan


def split_all(plan: DomainPlan, texts: list[str]) -> dict[str, str]:
    return {
        part: split
        for text in texts
        for split, part in plan.assign(Document(text, "d", None, ""), digest_of(text))
    }


def test_more_documents_do_not_move_others_between_splits() -> None:
    texts = [f"document {i}" for i in range(400)]
    few, many = observed(texts[:200]), observed(texts)
    assert not few.cuts
    assert split_all(few, texts[:200]).items() <= split_all(many, texts).items()


def test_shares_are_close_to_the_fractions() -> None:
    texts = [f"document {i}" for i in range(2000)]
    splits = list(split_all(observed(texts), texts).values())
    assert splits.count("valid") == pytest.approx(200, abs=60)
    assert splits.count("test") == pytest.approx(200, abs=60)


def test_one_long_document_is_cut_at_line_ends() -> None:
    text = "".join(f"line {i}\n" for i in range(1000))
    parts = {split: part for part, split in split_all(observed([text]), [text]).items()}
    assert list(parts) == ["train", "valid", "test"]
    assert "".join(parts.values()) == text
    assert all(part.endswith("\n") for part in parts.values())
    assert len(parts["valid"]) / len(text) == pytest.approx(0.1, abs=0.01)


@given(text=st.text("ab \n", min_size=40, max_size=300))
@settings(max_examples=100, deadline=None)
def test_cutting_loses_nothing_but_white_space(text: str) -> None:
    parts = [part for _, part in cut_document(text, {"valid": 0.1, "test": 0.1})]
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_named_splits_are_kept_and_missing_ones_are_made() -> None:
    plan = plan_domain({"train", "valid"}, CONFIG)
    assert list(plan.held_out) == ["test"]
    document = Document("x", "d", "valid", "")
    assert list(plan.assign(document, digest_of("x"))) == [("valid", "x")]


def test_a_sample_is_bounded_and_spread() -> None:
    texts = [f"{i:04d}" * 10 for i in range(3000)]
    sample = TextSample(budget=8_000)
    for text in texts:
        sample.add(text, digest_of(text))
    kept = list(sample.texts(plan_domain({"train", "valid", "test"}, CONFIG)))
    assert 4_000 <= sum(map(len, kept)) <= 16_000
    assert int(kept[0][:4]) < 500
    assert int(kept[-1][:4]) > 2500


def test_one_huge_document_is_sampled_from_all_over() -> None:
    sample = TextSample(budget=800)
    text = "a" * 50_000 + "b" * 50_000
    sample.add(text, digest_of(text))
    (kept,) = sample.texts(plan_domain({"train", "valid", "test"}, CONFIG))
    assert (kept.count("a"), kept.count("b")) == (400, 400)
