"""On tokens that nobody can predict causal routing gains nothing, and a known leak shows."""

import math
from pathlib import Path

import pytest
import torch

from pyper.config import SparseConfig
from pyper.stages.leak_probe import measure, train_on_noise
from slow.commands import json_of

pytestmark = pytest.mark.slow

CAUSAL = {
    "expert choice": SparseConfig(),
    "sigmoid": SparseConfig(gate="sigmoid"),
    "threshold": SparseConfig(routing="threshold"),
    "token choice": SparseConfig(routing="token_choice", top_k=2),
    "sign bias": SparseConfig(routing="token_choice", balance="sign_bias", gate="sigmoid"),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_routing_never_beats_chance(name: str) -> None:
    model = train_on_noise("sparse", CAUSAL[name], rule=None, steps=400)
    probed = measure(model, None, name)
    assert probed.loss >= math.log(8) - 3 * probed.standard_error
    assert not probed.leaks


def test_token_mixtures_never_beat_chance() -> None:
    model = train_on_noise("token_mixture", SparseConfig(), rule=None, steps=400)
    assert not measure(model, None, "token mixture").leaks


def test_choice_within_a_sequence_beats_chance_and_is_reported() -> None:
    torch.manual_seed(0)
    model = train_on_noise("sparse", SparseConfig(), rule="per_sequence", steps=1200)
    probed = measure(model, "per_sequence", "per sequence")
    assert probed.leaks
    assert probed.loss < math.log(8) - 10 * probed.standard_error
    # The same weights, as they would be decoded, gain nothing from it.
    assert not measure(model, None, "thresholds").leaks


def test_the_command_says_which_rules_see_the_future(tmp_path: Path) -> None:
    result = json_of("evaluate", "sparse", "--leak-probe", cwd=tmp_path)
    assert [row["leaks"] for row in result["rows"]] == [False, False, True]
