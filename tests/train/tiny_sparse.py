"""One tiny routed model and what it needs to train for a few steps."""

from typing import Any

from tiny_training import SEQ_LEN

from pyper.config import ExpertConfig, SparseConfig
from pyper.nn import Transformer, init_weights

MODES: dict[str, dict[str, Any]] = {
    "expert_choice": {},
    "threshold": {"routing": "threshold", "threshold_after": 0.4, "gate": "sigmoid"},
    "capped": {"routing": "capped", "max_experts_per_token": 2},
    "loss": {"routing": "token_choice", "shared_d_ff": 8},
    "sign_bias": {"routing": "token_choice", "balance": "sign_bias"},
    "quantile_bias": {"routing": "token_choice", "balance": "quantile_bias", "bias_rate": 0.1},
    "token_mixture": {"stem_layers": 1},
}


def sparse_config(mode: str, **sparse: Any) -> ExpertConfig:
    """Two layers, three experts."""
    return ExpertConfig(
        kind="token_mixture" if mode == "token_mixture" else "sparse",
        sparse=SparseConfig(**{"n_experts": 3, "threshold_decay": 0.8} | MODES[mode] | sparse),
        vocab_size=257,
        seq_len=SEQ_LEN,
        bos_id=0,
        d_model=16,
        n_layers=2,
        n_heads=2,
        d_ff=24,
    )


def sparse_model(mode: str, **sparse: Any) -> Transformer:
    model = Transformer(sparse_config(mode, **sparse))
    init_weights(model, 0)
    return model
