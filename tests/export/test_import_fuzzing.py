"""Whatever a folder holds, importing it ends in a model or in an error for people."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from export.small_stock import LLAMA_CONFIG, save_stock, stock_model
from pyper.errors import PyperError
from pyper.export import FAMILIES
from pyper.export.import_config import read_config
from pyper.stages.import_model import ImportOptions, import_model

KEYS = sorted(
    {*LLAMA_CONFIG, "head_dim", "num_key_value_heads", "hidden_act", "rope_theta", "rope_scaling"}
    | {"rope_parameters", "no_rope_layers", "no_rope_layer_interval", "sliding_window"}
    | {"use_sliding_window", "layer_types", "max_window_layers", "max_position_embeddings"}
    | {"attention_bias", "mlp_bias", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"}
    | {"original_max_position_embeddings", "partial_rotary_factor", "quantization_config"}
)
NUMBERS = st.one_of(
    st.integers(), st.integers(-3, 300), st.floats(), st.sampled_from([10**400, 2**31, 0, -1])
)
SCALING_KEYS = [
    *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    *("truncate", "low_freq_factor", "high_freq_factor", "rope_theta"),
    "original_max_position_embeddings",
]
SCALINGS = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "yarn", "llama3", "dynamic", "default"])},
    optional=dict.fromkeys(SCALING_KEYS, NUMBERS | st.none() | st.text()),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | SCALINGS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def refusal_of(attempt: Callable[[], object]) -> PyperError | None:
    """Any other error is a bug."""
    try:
        attempt()
    except PyperError as error:
        return error
    return None


@settings(max_examples=300, deadline=2000)
@given(
    kind=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
def test_any_config_is_understood_or_refused_in_one_line(
    kind: str, changes: dict[str, Any]
) -> None:
    values = LLAMA_CONFIG | {"model_type": kind, "architectures": None} | changes
    refusal = refusal_of(lambda: read_config(values))
    assert refusal is None or (refusal.hint and "\n" not in refusal.message)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_are_an_error_or_do_no_harm(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    source = save_stock(tmp_path / "stock", stock_model("Qwen3", head_dim=4), sharded=seed % 2 == 0)
    file = rng.choice(sorted(p for p in source.iterdir() if p.suffix in (".json", ".safetensors")))
    content = bytearray(file.read_bytes())
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    else:
        for _ in range(rng.choice([1, 1, 8])):
            head = min(len(content), 1500)  # where the meaning is
            content[rng.randrange(head)] = rng.randrange(256)
    file.write_bytes(content)
    console = Console(file=io.StringIO())
    refusal = refusal_of(lambda: import_model(source, tmp_path / "seed", ImportOptions(), console))
    assert (refusal is None) == (tmp_path / "seed").exists()


def test_the_damage_is_mostly_noticed(tmp_path: Path) -> None:
    """The test above says nothing where nothing is ever refused, or everything."""
    source = save_stock(tmp_path / "stock", stock_model("Qwen3", head_dim=4))
    console = Console(file=io.StringIO())
    import_model(source, tmp_path / "seed", ImportOptions(), console)
    for file in sorted(source.glob("*.safetensors")):
        shutil.copy(file, tmp_path / "kept")
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(PyperError):
            import_model(source, tmp_path / "other", ImportOptions(), console)
        shutil.copy(tmp_path / "kept", file)
    values = json.loads((source / "config.json").read_text())
    assert read_config(values).family.model_type == "qwen3"
