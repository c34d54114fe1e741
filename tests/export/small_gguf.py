"""Experts that llama.cpp has a twin of."""

from typing import Any

from pyper.config import RopeScaling
from pyper.data import TextTokenizer

SWIGLU = {"activation": "swiglu"}
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", SWIGLU | {"n_kv_heads": 2}),
    "biases": (
        "llama",
        SWIGLU
        | {
            "attention_bias": True,
            "attention_output_bias": True,
            "feed_forward_bias": True,
            "tie_embeddings": True,
        },
    ),
    "linear": ("llama", SWIGLU | {"rope_scaling": RopeScaling(kind="linear", factor=2.0)}),
    "ntk": ("llama", SWIGLU | {"rope_scaling": RopeScaling(kind="ntk", factor=4.0)}),
    "llama3": (
        "llama",
        SWIGLU | {"rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_seq_len=24)},
    ),
    "wide heads": ("llama", SWIGLU | {"head_dim": 16}),
    "relu2": ("arcee", {"activation": "relu2", "n_kv_heads": 2}),
    "qk-norm": ("qwen3", SWIGLU | {"qk_norm": True, "n_kv_heads": 2}),
    "post-norm": (
        "olmo2",
        SWIGLU | {"qk_norm": True, "qk_norm_over": "projection", "norm_position": "post"},
    ),
}
TEXT = "the fox and the crow don't meet by 12345 mills\n\n  near the sea; it's the SAME = 1 + 2"


def trained_bpe() -> TextTokenizer:
    """300 entries, of one text."""
    return TextTokenizer.train_bpe(iter([TEXT] * 50), 300)
