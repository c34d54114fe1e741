"""Whole transformers side by side, each of which reads the tokens that it chose.

The literal reading of "eight transformer experts joined by expert choice": an expert takes tokens
out of a pool that spans sequences, and attends among those of its tokens that belong to one
sequence, at their original positions. All experts run as one batch.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.kernels import router_gates
from pyper.kernels.activation import activate
from pyper.nn.attention import AttentionContext
from pyper.nn.causal_attention import causal_attention
from pyper.nn.expert_linear import ExpertLinear
from pyper.nn.norm import rms_norm
from pyper.nn.rope import apply_rotation
from pyper.nn.router_state import RouterState
from pyper.nn.sparse_feed_forward import Routed
from pyper.routing.expert_choice import (
    TokenChoice,
    as_mask,
    capacity_of,
    choose_tokens,
)
from pyper.routing.layer_statistics import layer_statistics
from pyper.routing.thresholds import above_threshold


class ExpertStack(nn.Module):
    """x + Σ_e gate_e · (expert_e(x) − x) over the experts that read a token.

    In training by expert choice over all tokens of the batch, in evaluation by thresholds: then a
    token's experts, and what they attend to, depend on the past alone.
    """

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.sparse = config.routing
        self.router = nn.Linear(config.d_model, self.sparse.n_experts, bias=False)
        n_layers = config.n_layers - self.sparse.stem_layers
        self.layers = nn.ModuleList(StackedBlock(config) for _ in range(n_layers))
        self.state = RouterState(self.sparse)

    def forward(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Routed]:
        """Transform x (B, T, D)."""
        tokens = rearrange(x, "b t d -> (b t) d")
        padding = None if context.padding is None else context.padding.flatten()
        router_logits, gates = router_gates(tokens, self.router.weight, self.sparse.gate)  # (N, E)
        scores = (gates if self.sparse.gate == "softmax" else router_logits).detach()
        if context.rule == "calibrate":  # there is one router: nobody reads what comes after it
            self.state.set_threshold(self._choose(scores, padding).kth_score)
            return x, Routed(layer_statistics(torch.zeros_like(scores).bool(), gates))
        chosen, routed, capacity = self._route(scores, gates, padding, context)
        if context.cached is not None:
            out = self._run_all(x, gates, chosen, context)
        else:
            # Thresholds let any number through: only then must a GPU be waited for.
            longest = int(chosen.sum(dim=0).max()) if capacity is None else capacity
            out = self._run_chosen(x, gates, chosen, longest, context)
        return out, routed

    def _route(
        self, scores: Tensor, gates: Tensor, padding: Tensor | None, context: AttentionContext
    ) -> tuple[Tensor, Routed, int | None]:
        """Chosen (N, E), what to say of it, and the tokens per expert where all have as many."""
        rule = context.rule or self.state.rule(self.training)
        assert rule != "per_sequence", "the control of the sparse layers has no twin here"
        passing = above_threshold(scores, self.state.threshold, padding)
        if rule == "threshold" and not self.training:
            return passing, Routed(layer_statistics(passing, gates, padding=padding)), None
        choice = self._choose(scores, padding)
        if self.training:
            self.state.observe_kth_score(choice.kth_score)
        gap = self.state.threshold_gap(choice.kth_score)
        by_choice = as_mask(choice.token_index, len(scores))
        chosen, other = (passing, by_choice) if rule == "threshold" else (by_choice, passing)
        statistics = layer_statistics(
            chosen, gates, other=other, threshold_gap=gap, padding=padding
        )
        capacity = None if rule == "threshold" else choice.token_index.shape[1]
        return chosen, Routed(statistics), capacity

    def _choose(self, scores: Tensor, padding: Tensor | None) -> TokenChoice:
        n_real = len(scores) if padding is None else int((~padding).sum())
        capacity = capacity_of(n_real, self.sparse.n_experts, self.sparse.capacity_factor)
        return choose_tokens(scores, capacity, padding)

    def _run_chosen(
        self, x: Tensor, gates: Tensor, chosen: Tensor, longest: int, context: AttentionContext
    ) -> Tensor:
        """Gather each expert's tokens, at most `longest`, in order; shorter ones are filled up."""
        if not longest:
            return x
        T, load = x.shape[1], chosen.sum(dim=0)
        # True before False, and in order of position: a stable sort brings the chosen forward.
        token_index = (~chosen.T).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
        is_real = torch.arange(longest, device=x.device) < load[:, None]  # (E, C)
        row = token_index // T
        order = torch.arange(longest, device=x.device)
        mask = (row[:, :, None] == row[:, None, :]) & (order[:, None] >= order)
        if context.mask is not None:  # documents apart: the mask says which tokens see which
            at = token_index % T
            full = context.mask.expand(x.shape[0], 1, T, T)[:, 0]
            mask = mask & full[row[:, :, None], at[:, :, None], at[:, None, :]]
        tokens = rearrange(x, "b t d -> (b t) d")
        start = tokens[token_index]  # (E, C, D)
        turn = [_by_token(c, x.shape[0], T)[token_index] for c in (context.cos, context.sin)]
        states = start
        for layer in self.layers:
            states = layer(states, turn[0], turn[1], mask.unsqueeze(1))
        weight = (gates.T.gather(1, token_index) * is_real).to(x.dtype).unsqueeze(-1)
        change = rearrange((states - start) * weight, "e c d -> (e c) d")
        return tokens.index_add(0, token_index.flatten(), change).view_as(x)

    def _run_all(
        self, x: Tensor, gates: Tensor, chosen: Tensor, context: AttentionContext
    ) -> Tensor:
        """With a cache: every expert reads every token, and what was not chosen is masked."""
        assert context.cached is not None
        context.cached.write_chosen(chosen)
        start = x.expand(self.sparse.n_experts, *x.shape)
        states = start
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, StackedBlock)
            states = layer.extend(states, context, number)
        weight = rearrange(gates * chosen, "(b t) e -> e b t 1", b=x.shape[0]).to(x.dtype)
        return x + ((states - start) * weight).sum(dim=0)


class StackedBlock(nn.Module):
    """One block of each of E transformers; every weight has E in front."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        E, D = config.routing.n_experts, config.d_model
        self.n_heads, self.n_kv_heads, self.eps = config.n_heads, config.kv_heads, config.norm_eps
        self.activation, self.stem_layers = config.activation, config.routing.stem_layers
        width, kv_width = (
            config.n_heads * config.dim_per_head,
            config.kv_heads * config.dim_per_head,
        )
        self.widths = (width, kv_width, kv_width)
        ff_width = 2 * config.ff_dim if config.activation == "swiglu" else config.ff_dim
        ff_bias = config.feed_forward_bias
        self.attention_norm = nn.Parameter(torch.ones(E, 1, D))
        self.qkv = ExpertLinear(E, D, sum(self.widths), config.attention_bias)
        self.q_norm = nn.Parameter(torch.ones(E, config.dim_per_head)) if config.qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(E, config.dim_per_head)) if config.qk_norm else None
        self.out = ExpertLinear(E, width, D, bias=False)
        self.feed_forward_norm = nn.Parameter(torch.ones(E, 1, D))
        self.up = ExpertLinear(E, D, ff_width, ff_bias)
        self.down = ExpertLinear(E, config.ff_dim, D, ff_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x (E, C, D); cos, sin (E, C, 1, K); mask (E, 1, C, C), True where a query may look."""
        query, key, value = self._query_key_value(x, cos, sin)
        mixed = causal_attention(query, key, value, mask)
        x = x + self.out(rearrange(mixed, "e h c k -> e c (h k)"))
        out: Tensor = x + self._feed_forward(x)
        return out

    def extend(self, x: Tensor, context: AttentionContext, number: int) -> Tensor:
        """x (E, B, T, D), the new tokens; keys and values go through the cache."""
        cached = context.cached
        assert cached is not None
        E, B = x.shape[:2]
        flat = rearrange(x, "e b t d -> e (b t) d")
        cos, sin = (
            _by_token(turn, B, x.shape[2]).expand(E, -1, -1, -1)
            for turn in (context.cos, context.sin)
        )
        heads = [
            rearrange(t, "e h (b t) k -> e b h t k", b=B)
            for t in self._query_key_value(flat, cos, sin)
        ]
        first = self.stem_layers + number * E
        mixed = [
            cached.attend(first + expert, *(h[expert] for h in heads), expert=expert)
            for expert in range(E)
        ]
        flat = flat + self.out(rearrange(mixed, "e b h t k -> e (b t) (h k)"))
        flat = flat + self._feed_forward(flat)
        out: Tensor = rearrange(flat, "e (b t) d -> e b t d", b=B)
        return out

    def _query_key_value(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        normed = rms_norm(x, self.attention_norm, self.eps)
        width, kv_width, _ = self.widths
        query_key, value = self.qkv(normed).split((width + kv_width, kv_width), dim=-1)
        query_key = rearrange(query_key, "e c (h k) -> e c h k", h=self.n_heads + self.n_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            gain = torch.cat(
                (
                    self.q_norm.unsqueeze(1).expand(-1, self.n_heads, -1),
                    self.k_norm.unsqueeze(1).expand(-1, self.n_kv_heads, -1),
                ),
                dim=1,
            )
            query_key = rms_norm(query_key, gain.unsqueeze(1), self.eps)
        query_key = rearrange(apply_rotation(query_key, cos, sin), "e c h k -> e h c k")
        query, key = query_key.split((self.n_heads, self.n_kv_heads), dim=1)
        return query, key, rearrange(value, "e c (h k) -> e h c k", h=self.n_kv_heads)

    def _feed_forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.feed_forward_norm, self.eps)
        out: Tensor = self.down(activate(self.up(normed), self.activation))
        return out


def _by_token(turn: Tensor, batch: int, length: int) -> Tensor:
    """cos or sin (T, 1, K) or (B, T, 1, K) as (B·T, 1, K)."""
    return turn.expand(batch, length, 1, turn.shape[-1]).flatten(0, 1)
