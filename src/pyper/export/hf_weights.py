"""Our weights by the names of `transformers`: which of theirs are stacked in one of ours."""

from dataclasses import dataclass

from pyper.config import ExpertConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """One of our tensors: theirs, one below the other."""

    own: str
    foreign: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Of the foreign ones."""

    @property
    def rows(self) -> list[int]:
        """How many rows each of theirs has in ours."""
        return [shape[0] for shape in self.shapes]


def weight_map(config: ExpertConfig) -> list[Stack]:
    """All weights of a dense expert, from the input table to the head."""
    table = (config.vocab_size, config.d_model)
    stacks = [_one("embedding.weight", "model.embed_tokens.weight", table)]
    for layer in range(config.n_layers):
        stacks += _block(config, f"blocks.{layer}.", f"model.layers.{layer}.")
    stacks.append(_one("norm.weight", "model.norm.weight", (config.d_model,)))
    if not config.tie_embeddings:
        stacks.append(_one("head.weight", "lm_head.weight", table))
    return stacks


def _block(config: ExpertConfig, here: str, there: str) -> list[Stack]:
    first, second = (
        ("input_layernorm", "post_attention_layernorm")
        if config.norm_position == "pre"
        else ("post_attention_layernorm", "post_feedforward_layernorm")
    )
    D = (config.d_model,)
    return [
        _one(here + "attention_norm.weight", f"{there}{first}.weight", D),
        *_attention(config, here + "attention.", there + "self_attn."),
        _one(here + "feed_forward_norm.weight", f"{there}{second}.weight", D),
        *_feed_forward(config, here + "feed_forward.", there + "mlp."),
    ]


def _attention(config: ExpertConfig, here: str, there: str) -> list[Stack]:
    width, kv_width = (n * config.dim_per_head for n in (config.n_heads, config.kv_heads))
    names = tuple(f"{there}{part}_proj" for part in "qkv")
    stacks = _linear(
        f"{here}qkv", names, (width, kv_width, kv_width), config.d_model, config.attention_bias
    )
    stacks += _linear(
        f"{here}out",
        (f"{there}o_proj",),
        (config.d_model,),
        width,
        config.attention_output_bias,
    )
    if config.qk_norm:
        by_head = config.qk_norm_over == "head"
        q, k = (config.dim_per_head,) * 2 if by_head else (width, kv_width)
        stacks.append(_one(f"{here}q_norm.weight", f"{there}q_norm.weight", (q,)))
        stacks.append(_one(f"{here}k_norm.weight", f"{there}k_norm.weight", (k,)))
    return stacks


def _feed_forward(config: ExpertConfig, here: str, there: str) -> list[Stack]:
    D, F, bias = config.d_model, config.ff_dim, config.feed_forward_bias
    parts = ("gate_proj", "up_proj") if config.activation == "swiglu" else ("up_proj",)
    names = tuple(there + part for part in parts)
    up = _linear(f"{here}up", names, (F,) * len(names), D, bias)
    return up + _linear(f"{here}down", (f"{there}down_proj",), (D,), F, bias)


def _linear(
    own: str, foreign: tuple[str, ...], rows: tuple[int, ...], width: int, has_bias: bool
) -> list[Stack]:
    weights = tuple(f"{name}.weight" for name in foreign)
    stacks = [Stack(f"{own}.weight", weights, tuple((n, width) for n in rows))]
    if has_bias:
        biases = tuple(f"{name}.bias" for name in foreign)
        stacks.append(Stack(f"{own}.bias", biases, tuple((n,) for n in rows)))
    return stacks


def _one(own: str, foreign: str, shape: Shape) -> Stack:
    return Stack(own, (foreign,), (shape,))
