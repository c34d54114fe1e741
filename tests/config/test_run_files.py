"""Run files: what is accepted, what is refused, and in which words."""

from typing import Any

import pytest
from pydantic import BaseModel

from pyper.config import (
    ExpertConfig,
    PrepareConfig,
    RunConfig,
    TrainConfig,
    parse_run,
)
from pyper.config.load import validate
from pyper.errors import ConfigError


def run_of(**sections: Any) -> RunConfig:
    return parse_run({"data": {"seq_len": 64}, **sections})


@pytest.mark.parametrize(
    ("sections", "key", "nearest"),
    [
        ({"train": {"epochs": 1, "learning_rat": 1}}, "train.learning_rat", "learning_rate"),
        ({"modle": {}}, "modle", "model"),
        ({"model": {"n_layer": 2}}, "model.n_layer", "n_layers"),
        ({"mixture": {"expert": 8}}, "mixture.expert", "n_experts"),
        (
            {"train": {"epochs": 1, "early_stopping": {"patiense": 3}}},
            "train.early_stopping.patiense",
            "patience",
        ),
        (
            {"model": {"rope_scaling": {"kind": "yarn", "factor": 2, "original": 5}}},
            "model.rope_scaling.original",
            "original_seq_len",
        ),
        ({"expert": [{"name": "law", "learning_rat": 1}]}, "expert.learning_rat", "learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    sections: dict[str, Any], key: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run(sections)
    assert caught.value.message == f"unknown key `{key}`"
    assert caught.value.hint == f"did you mean `{nearest}`?"


@pytest.mark.parametrize(
    ("make", "values", "message", "hint"),
    [
        (TrainConfig, {"steps": 1, "learning_rat": 1}, "unknown key `learning_rat`",
         "did you mean `learning_rate`?"),
        (ExpertConfig, {"d_modle": 8}, "unknown key `d_modle`", "did you mean `d_model`?"),
        (RunConfig, {"train": {"stops": 1}}, "unknown key `train.stops`", "did you mean `steps`?"),
        (TrainConfig, {"steps": 1, "learning_rate": -1.0},
         "`learning_rate`: input should be greater than 0, not -1.0",
         "mend `learning_rate` in `TrainConfig(…)`"),
        (ExpertConfig, {"activation": "gleu"},
         "`activation`: input should be 'gelu', 'gelu_tanh', 'swiglu' or 'relu2', not 'gleu'",
         "did you mean `gelu`?"),
        (ExpertConfig, {"activation": "softsign-x"},
         "`activation`: input should be 'gelu', 'gelu_tanh', 'swiglu' or 'relu2', "
         "not 'softsign-x'",
         "mend `activation` in `ExpertConfig(…)`"),
    ],
)  # fmt: skip
def test_a_section_made_in_python_says_the_same(
    make: type[BaseModel], values: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**values)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        run_of(data={"zzz": 1})
    assert caught.value.hint == "known: path, seq_len, loader_workers, weights"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "learning_rate", -1.0),
        ("train", "learning_rate", "fast"),
        ("train", "learning_rate", float("nan")),
        ("train", "beta2", 1.0),
        ("train", "seed_fraction", 1.0),
        ("train", "schedule", "step"),
        ("train", "precision", "fp4"),
        ("train", "global_batch_tokens", "many"),
        ("train", "global_batch_tokens", 0),
        ("train", "micro_batch_size", 0),
        ("train", "gradient_clip", 0),
        ("model", "d_model", 0),
        ("model", "activation", "sigmoid"),
        ("data", "seq_len", 7),
        ("data", "seq_len", 10**15),
        ("model", "seq_len", 10**15),
        ("data", "loader_workers", 65),
        ("mixture", "n_experts", 0),
        ("mixture", "temperature", 2.0),
        ("mixture", "router", "oracle"),
        ("mixture", "top_k", 9),
        ("run", "jobs", 0),
        ("run", "random_seed", -1),
        ("evaluate", "split", "train"),
    ],
)
def test_a_value_out_of_range_names_key_and_value(section: str, key: str, value: object) -> None:
    settings = {key: value} | ({"epochs": 1} if section == "train" else {})
    with pytest.raises(ConfigError) as caught:
        parse_run({section: settings})
    assert f"`{section}.{key}`" in caught.value.message
    assert str(value) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"d_model": 100, "n_heads": 8}, "not a multiple"),
        ({"n_heads": 8, "n_kv_heads": 3}, "must divide"),
        ({"head_dim": 5}, "even `head_dim`"),
    ],
)
def test_heads_must_fit(model: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        run_of(model=model)
    assert caught.value.hint


def test_a_batch_must_hold_whole_sequences() -> None:
    with pytest.raises(ConfigError, match=r"`train.global_batch_tokens` \(100\)") as caught:
        run_of(train={"epochs": 1, "global_batch_tokens": 100})
    assert caught.value.hint == "use e.g. 64"


@pytest.mark.parametrize("budget", [{}, {"epochs": 1, "steps": 2}, {"tokens": 5, "epochs": 1}])
def test_a_budget_is_given_in_exactly_one_way(budget: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="exactly one of `epochs`, `tokens` and `steps`"):
        run_of(train=budget)


@pytest.mark.parametrize(
    ("text", "count"),
    [("2B", 2_000_000_000), ("300M", 300_000_000), ("1.5k", 1500), ("2t", 2 * 10**12), (64, 64)],
)
def test_counts_may_have_a_unit(text: object, count: int) -> None:
    assert TrainConfig.model_validate({"tokens": text}).tokens == count


def test_sections_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ExpertConfig().d_model = 3  # type: ignore[misc]


class TestExperts:
    """`[[expert]]`."""

    def test_changes_only_what_it_names(self) -> None:
        run = run_of(
            train={"epochs": 4, "learning_rate": 1e-3, "weight_decay": 0.2},
            expert=[{"name": "law", "learning_rate": 3e-4}],
        )
        law = run.expert_train(5, "law")
        assert (law.learning_rate, law.weight_decay, law.epochs) == (3e-4, 0.2, 4)
        assert run.expert_train(5, "poems") == run.train

    def test_is_found_by_name_and_by_index(self) -> None:
        run = run_of(
            expert=[{"index": 3, "beta1": 0.5}, {"name": "law", "beta1": 0.6}], train={"steps": 1}
        )
        assert run.expert_train(3, "poems").beta1 == 0.5
        assert run.expert_train(0, "law").beta1 == 0.6
        assert run.expert_train(0).beta1 == run.train.beta1
        assert run.override_of(0) is None

    @pytest.mark.parametrize("own", [{"steps": 7}, {"tokens": "1k"}, {"epochs": 2}])
    def test_its_budget_replaces_the_one_of_the_run(self, own: dict[str, Any]) -> None:
        run = run_of(train={"epochs": 4}, expert=[{"index": 0} | own])
        train = run.expert_train(0)
        given = {k for k in ("epochs", "tokens", "steps") if getattr(train, k) is not None}
        assert given == own.keys()
        assert run.has_own_budget(0)
        assert not run.has_own_budget(1)

    def test_another_setting_is_no_budget(self) -> None:
        run = run_of(train={"epochs": 4}, expert=[{"index": 0, "beta1": 0.5}])
        assert not run.has_own_budget(0)

    def test_must_say_which_it_is(self) -> None:
        with pytest.raises(ConfigError, match="neither `name` nor `index`"):
            run_of(expert=[{"learning_rate": 1e-3}])

    @pytest.mark.parametrize("key", ["seed_fraction", "control", "random_shards"])
    def test_cannot_change_what_belongs_to_the_run(self, key: str) -> None:
        with pytest.raises(ConfigError, match=f"`{key}` belongs to the whole run"):
            run_of(expert=[{"index": 0, key: 0}])

    def test_may_stop_by_its_own_patience(self) -> None:
        run = run_of(expert=[{"index": 1, "early_stopping": {"patience": 10}}])
        stopping = run.expert_train(1).early_stopping
        assert stopping is not None
        assert stopping.patience == 10

    def test_its_batch_must_hold_whole_sequences(self) -> None:
        with pytest.raises(ConfigError, match="global_batch_tokens"):
            run_of(train={"epochs": 1}, expert=[{"index": 0, "global_batch_tokens": 100}])

    def test_a_value_out_of_range_names_the_expert(self) -> None:
        with pytest.raises(ConfigError, match=r"`expert\.learning_rate`"):
            run_of(expert=[{"index": 0, "learning_rate": -1}])


@pytest.mark.parametrize(
    ("values", "key"),
    [({"vocab_size": 10}, "vocab_size"), ({"split_by": "page"}, "split_by")],
)
def test_settings_of_prepare_are_checked_too(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"`{key}`"):
        validate(PrepareConfig, values)
