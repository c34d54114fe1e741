"""Configuration of a mixture of Pyper's experts."""

from transformers import PretrainedConfig


class PyperMixtureConfig(PretrainedConfig):
    """Which experts there are, and how one language model is made of them.

    experts: the shape of each (see `Decoder` in pyper_layers.py); expert_names: theirs.
    mixing: `posterior` mixes, at every token, the `mixing_top_k` experts that predicted the text so
    far best, w ∝ p^mixing_temperature; while generating, one whose weight falls below
    `mixing_prune` stops running. `top1` does so for the first `prefix_tokens` tokens; then the
    router (`unigram`, `lm`, or the `experts` themselves) settles on one expert. prices: what it
    takes off each expert's score, nats per token.
    """

    model_type = "pyper_mixture"

    def __init__(
        self,
        experts: list | None = None,
        expert_names: list | None = None,
        mixing: str = "posterior",
        mixing_temperature: float = 0.1,
        mixing_top_k: int = 2,
        mixing_prune: float = 0.001,
        prefix_tokens: int = 32,
        prices: list | None = None,
        router: str = "experts",
        router_models: list | None = None,
        max_position_embeddings: int = 0,
        **kwargs,
    ) -> None:
        self.experts = experts or []
        self.expert_names = expert_names or []
        self.mixing = mixing
        self.mixing_temperature = mixing_temperature
        self.mixing_top_k = mixing_top_k
        self.mixing_prune = mixing_prune
        self.prefix_tokens = prefix_tokens
        self.prices = prices
        self.router = router
        self.router_models = router_models or []
        self.max_position_embeddings = max_position_embeddings
        first = self.experts[0] if self.experts else {}
        self.vocab_size = first.get("vocab_size", 0)
        self.hidden_size = first.get("d_model", 0)
        self.num_hidden_layers = first.get("n_layers", 0)
        self.num_attention_heads = first.get("n_heads", 0)
        super().__init__(**kwargs)
