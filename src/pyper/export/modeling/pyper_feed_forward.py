"""Feed-forwards of Pyper's transformers, dense and sparse. Shapes: N tokens, F width, E experts."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Two linear maps around an activation; SwiGLU's gate and value are one product."""

    def __init__(self, s: SimpleNamespace, d_ff: int) -> None:
        super().__init__()
        self.activation = s.activation
        width = 2 * d_ff if s.activation == "swiglu" else d_ff
        self.up = nn.Linear(s.d_model, width, bias=s.feed_forward_bias)
        self.down = nn.Linear(d_ff, s.d_model, bias=s.feed_forward_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(activate(self.up(x), self.activation))


class ExpertLinear(nn.Module):
    """E linear maps: weight (E, out, in), bias (E, out)."""

    def __init__(self, n_experts: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(n_experts, out_features)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class SparseFeedForward(nn.Module):
    """shared(x) + Σ_e gate_e · f_e(x) over the experts e that a token goes to, if any.

    Experts that choose tokens (`expert_choice` and its like in training) take every token whose
    score exceeds their threshold: the choice depends on the token alone, so it is causal. Under
    `token_choice` a token takes its `top_k` experts.
    """

    def __init__(self, s: SimpleNamespace) -> None:
        super().__init__()
        self.sparse = sparse = SimpleNamespace(**s.sparse)
        self.activation, n_experts = s.activation, sparse.n_experts
        width = 2 * s.d_ff if s.activation == "swiglu" else s.d_ff
        self.router = nn.Linear(s.d_model, n_experts, bias=False)
        self.up = ExpertLinear(n_experts, s.d_model, width, s.feed_forward_bias)
        self.down = ExpertLinear(n_experts, s.d_ff, s.d_model, s.feed_forward_bias)
        self.shared = FeedForward(s, sparse.shared_d_ff) if sparse.shared_d_ff else None
        self.state = RouterState(n_experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        # float32: here rounding changes which expert runs, not just the last digit
        router_logits = wide_linear(tokens, self.router.weight)  # (N, E)
        is_softmax = self.sparse.gate == "softmax"
        gates = router_logits.softmax(-1) if is_softmax else router_logits.sigmoid()
        if self.sparse.routing == "token_choice":
            chosen = _highest(gates + self.state.balance_bias, self.sparse.top_k)
        else:
            chosen = self._above_threshold(gates if is_softmax else router_logits)
        if self.sparse.normalize_gates:
            gates = gates * chosen
            gates = gates / gates.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        for expert in range(self.sparse.n_experts):
            rows = chosen[:, expert].nonzero().squeeze(1)
            hidden = activate(self.up(tokens[rows], expert), self.activation)
            weighted = self.down(hidden, expert) * gates[rows, expert, None].to(x.dtype)
            out = out.index_add(0, rows, weighted)
        return out.view_as(x)

    def _above_threshold(self, scores: Tensor) -> Tensor:
        threshold = self.state.threshold
        passing = scores > threshold
        if self.sparse.routing != "capped":
            return passing
        highest = _highest(scores - threshold, self.sparse.max_experts_per_token)
        return passing & (highest | threshold.isinf())


class RouterState(nn.Module):
    """Thresholds (−∞: everything passes) and biases of one layer, always float32."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((n_experts,), -math.inf), requires_grad=False)
        self.balance_bias = nn.Parameter(torch.zeros(n_experts), requires_grad=False)


def activate(pre: Tensor, activation: str) -> Tensor:
    """The activation of (..., F), or of SwiGLU's gate and value (..., 2F)."""
    if activation == "swiglu":
        gate, value = pre.chunk(2, dim=-1)
        return F.silu(gate) * value
    if activation == "relu2":
        return F.relu(pre).square()
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def _highest(scores: Tensor, k: int) -> Tensor:
    """(N, E), True for the k highest of each row."""
    best = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))
