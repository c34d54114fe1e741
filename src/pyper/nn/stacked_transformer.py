"""Dense transformers of one shape in one pass, each over tokens of its own.

Small models are bound by launches and small products: side by side in batched products they fill a
GPU. The models stay what they are. Their weights are put side by side anew in every pass, which
copies them once, and autograd takes their gradients apart again.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyper.config import ExpertConfig
from pyper.kernels import add_norm, launch, norm_alone, normed_heads
from pyper.kernels.activation import activate, activate_rows
from pyper.nn.attention import AttentionContext
from pyper.nn.causal_attention import causal_attention
from pyper.nn.norm import rms_norm
from pyper.nn.rope import apply_rotation
from pyper.nn.transformer import Transformer

Weights = dict[str, Tensor]
"""By their names in a block, with E in front."""


def stacking_kind(model: Transformer) -> Hashable:
    """Equal for models that can go side by side; None for a model that cannot."""
    # Routers look at what an expert reads; products in 8 bits have scales of their own.
    products = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    if model.config.kind != "dense" or any(type(product) is not nn.Linear for product in products):
        return None
    return model.config.model_dump_json(), model.dtype, model.device


class StackedTransformer:
    """What `Transformer.read` does, for E models at once."""

    def __init__(self, models: Sequence[Transformer]) -> None:
        """The models are of one `stacking_kind`."""
        self.models, self.config = list(models), models[0].config
        self.recompute_blocks = max(m.recompute_blocks for m in models)
        self._layers = [
            {
                name: [b.get_parameter(name) for b in blocks]
                for name, _ in blocks[0].named_parameters()
            }
            for blocks in zip(*(m.blocks for m in models), strict=True)
        ]
        compiled = all(m.compiles_blocks for m in models)
        self._run_block: Any = torch.compile(run_block) if compiled else run_block

    def read(self, tokens: Tensor) -> Tensor:
        """Final states (E, B·T, D), normalised, of tokens (E, B, T)."""
        context = self.models[0].attention_context(tokens.flatten(0, 1))
        length = tokens.shape[-1]
        x = self._embed(tokens.flatten(1))
        for layer, parameters in enumerate(self._layers):
            weights = {name: torch.stack(own) for name, own in parameters.items()}
            rotates = layer not in self.config.no_rope_layers
            arguments = (x, weights, self.config, context, rotates, length)
            if layer < self.recompute_blocks and torch.is_grad_enabled():
                x = checkpoint(
                    self._run_block, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = self._run_block(*arguments)
        return _norm(x, torch.stack([m.norm.weight for m in self.models]), self.config)

    def _embed(self, tokens: Tensor) -> Tensor:
        """(E, N, D) of tokens (E, N): all tables as one, each expert's tokens in its own part."""
        tables = torch.stack([m.embedding.weight for m in self.models])
        first = torch.arange(len(tables), device=tokens.device) * tables.shape[1]
        return F.embedding(tokens + first[:, None], tables.flatten(0, 1))


def run_block(
    x: Tensor,
    weights: Weights,
    config: ExpertConfig,
    context: AttentionContext,
    rotates: bool,
    length: int,
) -> Tensor:
    """`Block.forward` of E blocks; x (E, N, D), N = B·T tokens in sequences of T = `length`."""
    first, second = weights["attention_norm.weight"], weights["feed_forward_norm.weight"]
    if config.norm_position == "post":
        out = _attention(x, weights, config, context, rotates, length)
        x = x + _norm(out, first, config)
        return x + _norm(_feed_forward(x, weights, config), second, config)
    x, normed = _add_norm(x, None, first, config)
    out = _attention(normed, weights, config, context, rotates, length)
    x, normed = _add_norm(x, out, second, config)
    return x + _feed_forward(normed, weights, config)


def _attention(
    x: Tensor,
    weights: Weights,
    config: ExpertConfig,
    context: AttentionContext,
    rotates: bool,
    length: int,
) -> Tensor:
    heads = _heads if _runs_as_one(x, config, rotates) else _heads_step_by_step
    query, key, value = heads(x, weights, config, context, rotates, length)
    mixed = causal_attention(query, key, value, context.mask)
    return _linear(
        rearrange(mixed, "(e b) h t k -> e (b t) (h k)", e=len(x)), weights, "attention.out"
    )


def _runs_as_one(x: Tensor, config: ExpertConfig, rotates: bool) -> bool:
    by_head = config.qk_norm_over == "head" or not config.qk_norm
    return rotates and by_head and launch.runs_triton(x)


def _heads(
    x: Tensor,
    weights: Weights,
    config: ExpertConfig,
    context: AttentionContext,
    rotates: bool,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (E·B, H, T, K), key and value (E·B, kv_heads, T, K), by kernels."""
    weight, bias = weights["attention.qkv.weight"], weights.get("attention.qkv.bias")
    gains = None
    if config.qk_norm:
        both = (weights["attention.q_norm.weight"], weights["attention.k_norm.weight"])
        gains = torch.stack(both, dim=1)
    turns = (context.cos, context.sin)
    return normed_heads(x, weight, bias, gains, *turns, config.n_heads, length, config.norm_eps)


def _heads_step_by_step(
    x: Tensor,
    weights: Weights,
    config: ExpertConfig,
    context: AttentionContext,
    rotates: bool,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_heads` gives, by plain operations."""
    n_heads, n_kv_heads, K = config.n_heads, config.kv_heads, config.dim_per_head
    query_key, value = _linear(x, weights, "attention.qkv").split(
        ((n_heads + n_kv_heads) * K, n_kv_heads * K), dim=-1
    )
    if config.qk_norm:
        query_key = _normalize(query_key, weights, config)
    query_key = rearrange(query_key, "e (b t) (h k) -> (e b) t h k", t=length, k=K)
    if rotates:
        query_key = apply_rotation(query_key, context.cos, context.sin)
    query, key = rearrange(query_key, "b t h k -> b h t k").split((n_heads, n_kv_heads), dim=1)
    return query, key, rearrange(value, "e (b t) (h k) -> (e b) h t k", t=length, k=K)


def _normalize(query_key: Tensor, weights: Weights, config: ExpertConfig) -> Tensor:
    """QK-norm of queries and keys (E, N, (H + kv_heads)·K), over each head or over all of them."""
    query_gain, key_gain = weights["attention.q_norm.weight"], weights["attention.k_norm.weight"]
    if config.qk_norm_over == "projection":
        parts = query_key.split((query_gain.shape[1], key_gain.shape[1]), dim=-1)
        gains = (query_gain, key_gain)
        return torch.cat([_norm(p, g, config) for p, g in zip(parts, gains, strict=True)], dim=-1)
    gain = torch.cat(
        (
            query_gain.unsqueeze(1).expand(-1, config.n_heads, -1),
            key_gain.unsqueeze(1).expand(-1, config.kv_heads, -1),
        ),
        dim=1,
    )
    heads = rearrange(query_key, "e n (h k) -> e n h k", h=gain.shape[1])
    return rms_norm(heads, gain.unsqueeze(1), config.norm_eps).flatten(2)


def _feed_forward(x: Tensor, weights: Weights, config: ExpertConfig) -> Tensor:
    pre = _linear(x, weights, "feed_forward.up")
    act = activate_rows if launch.runs_triton(pre) else activate
    return _linear(act(pre, config.activation), weights, "feed_forward.down")


def _norm(x: Tensor, gain: Tensor, config: ExpertConfig) -> Tensor:
    """RMSNorm of x (E, N, D) with gains (E, D)."""
    # Compilers fuse the plain one with what stands around it.
    if launch.runs_triton(x) and not torch.compiler.is_compiling():
        return norm_alone(x, gain, config.norm_eps)
    return rms_norm(x, gain.unsqueeze(1), config.norm_eps)


def _add_norm(
    x: Tensor, out: Tensor | None, gain: Tensor, config: ExpertConfig
) -> tuple[Tensor, Tensor]:
    """x + out (x itself without) and its norm."""
    if launch.runs_triton(x) and not torch.compiler.is_compiling():
        return add_norm(x, out, gain, config.norm_eps)
    x = x if out is None else x + out
    return x, _norm(x, gain, config)


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """(E, N, out) of x (E, N, in)."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """x_e · W_eᵀ (+ b_e); the weight's gradient comes in the order of its memory.

    That of a batched product with a transposed weight comes transposed: a copy for each weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_bias = grad.sum(dim=1) if ctx.needs_input_grad[2] else None
        return torch.bmm(grad, weight), torch.bmm(grad.mT, x), to_bias
