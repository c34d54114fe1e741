"""Configuration of one of Pyper's transformers."""

from transformers import PretrainedConfig


class PyperConfig(PretrainedConfig):
    """`shape` holds everything about the layers; see `Decoder` in pyper_layers.py."""

    model_type = "pyper"

    def __init__(self, shape: dict | None = None, **kwargs) -> None:
        self.shape = shape or {}
        self.vocab_size = self.shape.get("vocab_size", 0)
        self.hidden_size = self.shape.get("d_model", 0)
        self.num_hidden_layers = self.shape.get("n_layers", 0)
        self.num_attention_heads = self.shape.get("n_heads", 0)
        self.max_position_embeddings = self.shape.get("seq_len", 0)
        super().__init__(**kwargs)
