"""A dense GELU expert's shape in transformers."""

from typing import Any

from pyper.config import ExpertConfig


def arcee_config(shape: ExpertConfig) -> Any:
    """Arcee: RMSNorm, RoPE and a feed-forward of two layers, as an expert has."""
    from transformers import ArceeConfig

    return ArceeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.ff_dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        head_dim=shape.dim_per_head,
        hidden_act="gelu",
        max_position_embeddings=shape.seq_len,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
