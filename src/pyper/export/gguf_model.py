"""One dense expert in the words of GGUF: an architecture of llama.cpp that computes the same.

`llama` is SwiGLU with or without biases and turns neighbouring pairs, so that the rows of q and k
change their order; `qwen3` has QK-norm by head, `olmo2` QK-norm over all heads and post-norm,
`arcee` squared ReLU without a gate. There is no twin of a GELU expert: llama.cpp's architectures
with two linear maps around a GELU have LayerNorm, and its GELU is the tanh approximation.
"""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from pyper.config import ExpertConfig
from pyper.errors import ConfigError
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer
from pyper.nn.rope import inverse_frequencies

_PAIRED = ("llama", "arcee")  # architectures that turn (x_2i, x_2i+1), not (x_i, x_i+K/2)
_NORMS = {
    "olmo2": ("post_attention_norm", "post_ffw_norm"),
    **dict.fromkeys(("llama", "arcee", "qwen3"), ("attn_norm", "ffn_norm")),
}


def gguf_architecture(config: ExpertConfig) -> str:
    """llama.cpp's name of the architecture. Raises ConfigError for an expert without a twin."""
    if config.kind != "dense":
        raise _no_twin(f'`kind = "{config.kind}"`', "export one dense expert, or `--to hf`")
    if config.activation in ("gelu", "gelu_tanh"):
        raise _no_twin(
            f'`activation = "{config.activation}"`: llama.cpp has two linear maps around a GELU '
            "only with LayerNorm, and computes GELU by its tanh approximation",
            'train with `activation = "swiglu"` or `"relu2"`, or export `--to hf`',
        )
    name, plain = _nearest(config), config.activation == "relu2"
    by_head = config.qk_norm and config.qk_norm_over == "head"
    has_bias = config.attention_bias or config.attention_output_bias or config.feed_forward_bias
    wrong = {
        "`qk_norm`": plain and config.qk_norm,
        "`qk_norm_over`": config.qk_norm and by_head == (name == "olmo2"),
        "`norm_position`": (config.norm_position == "post") != (name == "olmo2"),
        "biases": has_bias and name != "llama",
        "`no_rope_layers`": bool(config.no_rope_layers),
        '`rope_scaling = { kind = "yarn" }`': _scaling(config) == "yarn",
        '`rope_scaling = { kind = "llama3" }`': (
            _scaling(config) == "llama3" and name not in _PAIRED
        ),
        "an unknown `seq_len`": not config.seq_len,
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise _no_twin(
                f"{what} in `{name}`, the architecture nearest to this expert", "export `--to hf`"
            )
    return name


def gguf_metadata(config: ExpertConfig) -> dict[str, int | float | str]:
    """What `llama.…` keys hold beside the tokenizer, without the architecture's prefix."""
    values: dict[str, int | float | str] = {
        "vocab_size": config.vocab_size,
        "context_length": config.seq_len,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.ff_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.dim_per_head,
        "attention.value_length": config.dim_per_head,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.dim_per_head,
        "rope.freq_base": config.rope_theta,
    }
    scaling, K = config.rope_scaling, config.dim_per_head
    if scaling is not None and scaling.kind == "ntk":  # nothing but a larger base
        values["rope.freq_base"] = config.rope_theta * scaling.factor ** (K / (K - 2))
    if scaling is not None and scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    return values


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The weights by llama.cpp's names."""
    config, own = model.config, model_tensors(model)
    name = gguf_architecture(config)
    yield "token_embd.weight", own["embedding.weight"]
    yield "output_norm.weight", own["norm.weight"]
    if "head.weight" in own:
        yield "output.weight", own["head.weight"]
    if _scaling(config) == "llama3":
        yield "rope_freqs.weight", _frequency_factors(config)
    for layer in range(config.n_layers):
        prefix = f"blocks.{layer}."
        part = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
        for key, tensor in _block(part, config, name):
            yield f"blk.{layer}.{key}", tensor


def _block(
    part: dict[str, Tensor], config: ExpertConfig, name: str
) -> Iterator[tuple[str, Tensor]]:
    attention_norm, feed_forward_norm = _NORMS[name]
    yield f"{attention_norm}.weight", part["attention_norm.weight"]
    yield f"{feed_forward_norm}.weight", part["feed_forward_norm.weight"]
    heads = (config.n_heads, config.kv_heads, config.kv_heads)
    rows = [n * config.dim_per_head for n in heads]
    for key, tensor in part.items():
        kind = key.rpartition(".")[2]  # weight or bias
        if key.startswith("attention.qkv."):
            query, key_rows, value = tensor.split(rows)
            if name in _PAIRED:
                query, key_rows = _paired(query, heads[0]), _paired(key_rows, heads[1])
            for letter, rows_of in zip("qkv", (query, key_rows, value), strict=True):
                yield f"attn_{letter}.{kind}", rows_of
        elif key.startswith("attention.out."):
            yield f"attn_output.{kind}", tensor
        elif key.startswith(("attention.q_norm.", "attention.k_norm.")):
            yield f"attn_{key.removeprefix('attention.')}", tensor
        elif key.startswith("feed_forward.up.") and config.activation == "swiglu":
            gate, value = tensor.chunk(2)
            yield f"ffn_gate.{kind}", gate
            yield f"ffn_up.{kind}", value
        elif key.startswith(("feed_forward.up.", "feed_forward.down.")):
            yield f"ffn_{key.removeprefix('feed_forward.')}", tensor


def _nearest(config: ExpertConfig) -> str:
    if config.activation == "relu2":
        return "arcee"
    if config.norm_position == "post" or (config.qk_norm and config.qk_norm_over != "head"):
        return "olmo2"
    return "qwen3" if config.qk_norm else "llama"


def _scaling(config: ExpertConfig) -> str | None:
    return None if config.rope_scaling is None else config.rope_scaling.kind


def _paired(rows: Tensor, n_heads: int) -> Tensor:
    """Rows (H·K, …) in an order in which each pair that RoPE turns stands side by side."""
    return rearrange(rows, "(h half k) ... -> (h k half) ...", h=n_heads, half=2)


def _frequency_factors(config: ExpertConfig) -> Tensor:
    """(K/2,), by which llama.cpp divides the unscaled frequencies."""
    shape: tuple[Any, ...] = (config.dim_per_head, config.rope_theta)
    cpu = torch.device("cpu")
    return inverse_frequencies(*shape, None, cpu) / inverse_frequencies(
        *shape, config.rope_scaling, cpu
    )


def _no_twin(what: str, hint: str) -> ConfigError:
    return ConfigError(f"llama.cpp has no exact twin of {what}", hint=hint)
