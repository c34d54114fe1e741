"""Small models of `transformers` with random weights, their import, and texts for both sides."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pyper.data import TextTokenizer
from pyper.nn import KVCache, Transformer
from pyper.stages.import_model import ImportOptions, import_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedModel
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB, CONTEXT = 257, 64  # as many as the byte tokenizer has
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
# The least that config.json of a Llama says.
LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
    "rope_theta": 500.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
GQA = {"num_key_value_heads": 2}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
# Each at least: plain, tied with grouped queries, every bias, every scaling of positions.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "Llama": [
        {},
        GQA | TIED,
        BIASED | {"mlp_bias": True, "num_key_value_heads": 1},
        {"rope_parameters": LLAMA3, "head_dim": 8},
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}},
        {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.2, "truncate": False}},
        {"rope_parameters": LINEAR},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}},
        {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ],
    "Mistral": [
        {"sliding_window": None},
        GQA | TIED | {"sliding_window": None},
        {"head_dim": 6, "sliding_window": None, "rope_parameters": LINEAR},
        {"sliding_window": CONTEXT // 2},
    ],
    "Qwen2": [{}, GQA | TIED, {"rope_parameters": YARN}],
    "Qwen3": [
        {"head_dim": 4},
        GQA | TIED | {"head_dim": 8},
        BIASED | {"head_dim": 6},
        {"rope_parameters": YARN, "head_dim": 4},
    ],
    "SmolLM3": [
        {"no_rope_layer_interval": 2},
        GQA | {"no_rope_layers": [1, 0, 0], "tie_word_embeddings": False},
        BIASED | {"mlp_bias": True, "rope_parameters": YARN, "no_rope_layer_interval": 3},
    ],
    "Olmo2": [{}, GQA, BIASED | TIED, {"rope_parameters": LINEAR}],
    "Arcee": [
        {},
        GQA | {"hidden_act": "gelu"},
        TIED | {"hidden_act": "gelu_new"},
        BIASED | {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        {"rope_parameters": LLAMA3},
    ],
}
CASES = [(family, index) for family, variants in VARIANTS.items() for index in range(len(variants))]


def stock_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random one, biases and gains included, its logits far from flat."""
    config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape))
    return model


def open_stock(folder: Path) -> PreTrainedModel:
    """As a user would, without code from the folder."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=False, local_files_only=True
    ).eval()


def save_stock(folder: Path, model: PreTrainedModel, *, sharded: bool = False) -> Path:
    """As somebody publishes it, with a tokenizer of bytes."""
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    TextTokenizer.bytes_only().save(folder / "tokenizer.json")
    return folder


def imported(source: Path, output: Path, **options: Any) -> dict[str, Any]:
    """The facts of an import; what it says on the way is not shown."""
    return import_model(source, output, ImportOptions(**options), Console(file=io.StringIO()))


def some_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logit_difference(ours: Transformer, theirs: PreTrainedModel) -> float:
    """The largest over whole contexts, as a share of the largest logit where that is above 1."""
    tokens = some_tokens(2, ours.config.seq_len) % ours.config.vocab_size
    own, expected = ours(tokens), theirs(tokens).logits
    assert own.std() > 0.3  # flat logits would agree whatever the weights
    return float((own - expected).abs().max() / expected.abs().max().clamp(min=1))


@torch.no_grad()
def our_text(model: Transformer, prompt: Tensor, length: int) -> Tensor:
    """Greedy, up to `length` tokens, every token read once and kept in the cache."""
    rows = len(prompt)
    cache = KVCache.allocate(model.config, rows, length, device=model.device, dtype=model.dtype)
    tokens, new = prompt, prompt
    while tokens.shape[1] < length:
        new = model.head(model.extend(new, cache)[:, -1:]).argmax(dim=-1)
        tokens = torch.cat((tokens, new), dim=1)
    return tokens


@torch.no_grad()
def their_text(model: PreTrainedModel, prompt: Tensor, length: int) -> Tensor:
    """What `generate` of transformers makes of it, with its cache."""
    model.generation_config.eos_token_id = None
    return model.generate(prompt, max_length=length, do_sample=False, use_cache=True)
