"""Feed-forwards of which each reads the tokens that are routed to it."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.kernels import (
    combine_rows,
    expert_feed_forward,
    gather_rows,
    launch,
    router_gates,
    slots_of,
)
from pyper.kernels.activation import activate
from pyper.nn.expert_linear import ExpertLinear
from pyper.nn.feed_forward import FeedForward
from pyper.nn.kv_cache import ROW_TILE
from pyper.nn.router_state import RouterState
from pyper.routing.capped_choice import choose_tokens_capped
from pyper.routing.expert_choice import (
    TokenChoice,
    capacity_of,
    choose_tokens,
)
from pyper.routing.layer_statistics import LayerStatistics, layer_statistics
from pyper.routing.thresholds import above_threshold
from pyper.routing.token_choice import choose_experts, load_balancing_loss, router_z_loss

# Rows per expert are rounded up to a multiple of this.
_ROWS = 128

Rule = Literal["expert_choice", "per_sequence", "threshold", "calibrate"]
"""How tokens are chosen. `expert_choice` pools all tokens of the batch; `per_sequence` each
sequence on its own: it leaks the future, and is the negative control of the tests. Neither is
causal. `calibrate` first sets the thresholds to the k-th scores of this pool, then goes by them.
Ignored by token choice, which always is causal."""


@dataclass(frozen=True)
class Routed:
    """What one routed layer says of one forward pass."""

    statistics: LayerStatistics
    auxiliary: Tensor | None = None
    """Scalar, balancing losses per token, already weighted; None where there are none."""


class SparseFeedForward(nn.Module):
    """y = shared(x) + Σ_e gate_e · f_e(x) over the experts e that a token is routed to.

    A token that no expert reads passes through the residual alone (and the shared expert).
    Gates are not renormalised by the number of experts, except where token choice is told to
    (`normalize_gates`). In training tokens are routed as
    `[model.sparse] routing` says; in evaluation by thresholds (or token choice), which is causal.
    """

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        sparse = self.sparse = config.routing
        self.activation, n_experts = config.activation, sparse.n_experts
        width = 2 * config.ff_dim if config.activation == "swiglu" else config.ff_dim
        bias = config.feed_forward_bias
        self.router = nn.Linear(config.d_model, n_experts, bias=False)
        self.up = ExpertLinear(n_experts, config.d_model, width, bias)
        self.down = ExpertLinear(n_experts, config.ff_dim, config.d_model, bias)
        shared = config.model_copy(update={"d_ff": sparse.shared_d_ff})
        self.shared = FeedForward(shared) if sparse.shared_d_ff else None
        self.state = RouterState(sparse, width)

    def forward(
        self, x: Tensor, rule: Rule | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Routed]:
        """Transform x (B, T, D). padding: (B, T), True where there is no token.

        rule: None takes the one that belongs to training or evaluation.
        """
        tokens = rearrange(x, "b t d -> (b t) d")
        absent = None if padding is None else padding.flatten()
        # float32: here rounding changes which expert runs, not just the last digit
        router_logits, gates = router_gates(tokens, self.router.weight, self.sparse.gate)  # (N, E)
        if self.sparse.is_expert_choice:
            rule = rule or self.state.rule(self.training)
            out, routed = self._by_experts(tokens, router_logits, gates, rule, absent, x.shape[0])
        else:
            out, routed = self._by_tokens(tokens, router_logits, gates, absent)
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view_as(x), routed

    def _by_experts(
        self,
        tokens: Tensor,
        router_logits: Tensor,
        gates: Tensor,
        rule: Rule,
        padding: Tensor | None,
        n_rows: int,
    ) -> tuple[Tensor, Routed]:
        # Softmax gates are what is compared (the paper); sigmoids keep the order of the logits.
        scores = (gates if self.sparse.gate == "softmax" else router_logits).detach()
        passing = self._passing(scores, padding)
        if rule == "threshold" and not self.training:
            return self._run_mask(tokens, gates, passing), Routed(
                layer_statistics(passing, gates, padding=padding)
            )
        choice = self._choose(scores, padding, n_rows if rule == "per_sequence" else 1)
        if rule == "calibrate":
            self.state.set_threshold(choice.kth_score)
            return self._by_experts(tokens, router_logits, gates, "threshold", padding, n_rows)
        slots = slots_of(choice.token_index, len(tokens))
        chosen = slots >= 0
        gap = self.state.threshold_gap(choice.kth_score)
        if self.training:
            self.state.observe_kth_score(choice.kth_score)
        if rule == "threshold":
            out = self._run_mask(tokens, gates, passing, self.state.room(len(tokens)))
            chosen, other = passing, chosen
        else:
            out, other = self._run_index(tokens, gates, choice.token_index, slots), passing
        statistics = layer_statistics(
            chosen, gates, other=other, threshold_gap=gap, padding=padding
        )
        return out, Routed(statistics)

    def _passing(self, scores: Tensor, padding: Tensor | None) -> Tensor:
        """(N, E): what thresholds let through; `capped` keeps a token's furthest above them."""
        threshold = self.state.threshold
        passing = above_threshold(scores, threshold, padding)
        if self.sparse.routing != "capped":
            return passing
        # Before there are thresholds all lie equally far above: then nothing is capped.
        highest = choose_experts(scores - threshold, self.sparse.max_experts_per_token)
        return passing & (highest | threshold.isinf())

    def _choose(self, scores: Tensor, padding: Tensor | None, pools: int) -> TokenChoice:
        """Expert choice within each of `pools` equal parts of scores (N, E)."""
        if pools > 1:
            size = len(scores) // pools
            absent = [None] * pools if padding is None else padding.split(size)
            parts = [
                self._choose(part, gone, 1)
                for part, gone in zip(scores.split(size), absent, strict=True)
            ]
            index = [part.token_index + i * size for i, part in enumerate(parts)]
            kth_score = torch.stack([part.kth_score for part in parts]).mean(dim=0)
            return TokenChoice(torch.cat(index, dim=1), kth_score)
        n_real = len(scores) if padding is None else int((~padding).sum())
        capacity = capacity_of(n_real, self.sparse.n_experts, self.sparse.capacity_factor)
        choice = choose_tokens(scores, capacity, padding)
        if self.sparse.routing != "capped":
            return choice
        limit = self.sparse.max_experts_per_token
        capped = choose_tokens_capped(scores, capacity, limit, padding)
        # The threshold is that of plain expert choice: the cap reaches further down, to tokens
        # that others could not take, and its lowest score would let almost everything through.
        return TokenChoice(capped.token_index, choice.kth_score)

    def _by_tokens(
        self, tokens: Tensor, router_logits: Tensor, gates: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Routed]:
        sparse = self.sparse
        biased = gates.detach() + self.state.balance_bias
        chosen = choose_experts(biased, sparse.top_k, padding)
        auxiliary = None
        if self.training:
            real = slice(None) if padding is None else ~padding
            kept = gates[real]
            share = self.state.observe_load(chosen, kept.detach())
            auxiliary = sparse.router_z_weight * router_z_loss(router_logits[real])
            if sparse.balance == "loss":
                probs = kept / kept.sum(dim=-1, keepdim=True)
                balance = load_balancing_loss(probs, share.to(probs))
                auxiliary = auxiliary + sparse.load_balancing_weight * balance
        weights = _normalized(gates, chosen) if sparse.normalize_gates else gates
        out = self._run_mask(tokens, weights, chosen, len(tokens) * sparse.top_k)
        return out, Routed(layer_statistics(chosen, gates, padding=padding), auxiliary)

    def _run_index(
        self, tokens: Tensor, gates: Tensor, token_index: Tensor, slots: Tensor
    ) -> Tensor:
        """Equal numbers for every expert, token_index (E, C): batched products."""
        if not launch.runs_triton(tokens):
            # Outputs are narrower than hidden rows: without kernels their gates come cheaper.
            out = self.down(activate(self.up(tokens[token_index]), self.activation))
            out = out * gates.T.gather(1, token_index).to(out.dtype).unsqueeze(-1)
            return torch.zeros_like(tokens).index_add(0, token_index.flatten(), out.flatten(0, 1))
        rows = gather_rows(tokens, token_index, slots)
        out = expert_feed_forward(
            *(rows, token_index, gates, self.up.weight, self.down.weight),
            activation=self.activation,
            up_bias=self.up.bias,
        )
        start = None
        if self.down.bias is not None:
            start = ((gates * (slots >= 0)) @ self.down.bias.to(gates.dtype)).to(tokens.dtype)
        return combine_rows(out, token_index, slots, residual=start)

    def _run_mask(
        self, tokens: Tensor, gates: Tensor, chosen: Tensor, room: int | None = None
    ) -> Tensor:
        """Any number for each expert, chosen (N, E); `room`: at most so many are True, if known."""
        grouped = tokens.is_cuda and tokens.dtype == torch.bfloat16
        if grouped and room is not None:
            return self._run_room(tokens, gates, chosen, room)
        run = self._run_counted if grouped else self._run_one_by_one
        out: Tensor = run(tokens, gates, chosen)
        return out

    # Not compiled: sizes are those of the data, and others in every step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_one_by_one(self, tokens: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        expert, token = chosen.T.nonzero(as_tuple=True)
        parts = tokens[token].split(chosen.sum(dim=0).tolist())
        out = torch.cat([self._one_expert(e, part) for e, part in enumerate(parts)])
        return _weighted_sum(tokens, out, gates, token, expert)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_counted(self, tokens: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """In one grouped product of exactly the rows that are needed: a GPU is waited for."""
        expert, token = chosen.T.nonzero(as_tuple=True)
        ends = chosen.sum(dim=0).cumsum(dim=0, dtype=torch.int32)
        hidden = activate(self.up.grouped(tokens[token], expert, ends), self.activation)
        return _weighted_sum(tokens, self.down.grouped(hidden, expert, ends), gates, token, expert)

    def _run_room(self, tokens: Tensor, gates: Tensor, chosen: Tensor, room: int) -> Tensor:
        """The same of `room` rows whatever is chosen: nothing is waited for.

        Rows behind the last one that is needed belong to no product, which leaves what was there
        in memory in their place, forwards and backwards: each is replaced by zeros.
        """
        expert, token = chosen.T.nonzero_static(size=room, fill_value=0).unbind(dim=1)
        ends = chosen.sum(dim=0).cumsum(dim=0, dtype=torch.int32)
        row = torch.arange(room, device=tokens.device)
        needed = row < ends[-1]
        # Sums over the rows of one token take turns: spare rows must not all be of the first.
        token = torch.where(needed, token, row % len(tokens))
        needed = needed.unsqueeze(1)
        rows = tokens[token].where(needed, 0)
        pre = self.up.grouped(rows, expert, ends).where(needed, 0)
        hidden = activate(pre, self.activation)
        out = self.down.grouped(hidden, expert, ends).where(needed, 0)
        return _weighted_sum(tokens, out, gates, token, expert)

    def _one_expert(self, expert: int, rows: Tensor) -> Tensor:
        # Products of many different sizes are slow on a CPU: a kernel is built for each size.
        fill = -len(rows) % (_ROWS if len(rows) > _ROWS else ROW_TILE)
        padded = F.pad(rows, (0, 0, 0, fill)) if fill else rows
        hidden = activate(self.up.of_expert(expert, padded), self.activation)
        return self.down.of_expert(expert, hidden)[: len(rows)]


def _weighted_sum(
    tokens: Tensor, out: Tensor, gates: Tensor, token: Tensor, expert: Tensor
) -> Tensor:
    """(N, D) of what experts made, out (M, D), of the tokens (M,): each times its gate."""
    weighted = out * gates[token, expert].to(out.dtype).unsqueeze(-1)
    return torch.zeros_like(tokens).index_add(0, token, weighted)


def _normalized(gates: Tensor, chosen: Tensor) -> Tensor:
    """Gates (N, E) of the chosen (N, E), divided by their sum; 0 in a row of which none is."""
    kept = gates * chosen
    return kept / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
