"""What routing remembers from step to step: thresholds and biases, in float32."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyper.config import SparseConfig
from pyper.routing.thresholds import ThresholdAverage
from pyper.routing.token_choice import quantile_updated_bias, sign_updated_bias

# Hidden numbers of a layer for which there is room though few of them may be needed: at eight
# experts and 16 k tokens, for a d_ff of 1,024.
_ROOM = 2**27


class RouterState(nn.Module):
    """Thresholds (experts choose) or biases (tokens choose) of one layer.

    Saved with the weights and never cast to half precision. Forward passes in training *observe*;
    `end_step` takes what all micro-batches of an optimizer step observed into account, once.
    Evaluation changes nothing.
    """

    threshold_total: Tensor
    threshold_updates: Tensor
    balance_bias: Tensor

    def __init__(self, sparse: SparseConfig, width: int = 0) -> None:
        """width: of the hidden rows; 0 where it is not known."""
        super().__init__()
        self.sparse, self.width = sparse, width
        # Not the share of training itself, which would be compiled into a pass as a constant.
        self.trains_by_threshold = self._trains_by_threshold(0.0)
        self.is_recomputing = False
        """In a backward pass that computes activations again: everything was observed before."""
        n = sparse.n_experts
        self.register_buffer("threshold_total", torch.zeros(n))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("balance_bias", torch.zeros(n))
        self._forget()

    @property
    def threshold(self) -> Tensor:
        """(E,), −∞ before the first training step."""
        return self._average.value(self.sparse.threshold_decay)

    def rule(self, training: bool) -> Literal["expert_choice", "threshold"]:
        """How experts choose now."""
        return "threshold" if not training or self.trains_by_threshold else "expert_choice"

    def has_fixed_shapes(self, dtype: torch.dtype, n_tokens: int) -> bool:
        """Whether kernels of a training pass over `n_tokens` do not depend on what is chosen."""
        if self.sparse.is_expert_choice and self.rule(training=True) == "expert_choice":
            return True
        # In bf16 one grouped product of as many rows as ever; else expert after expert.
        has_room = not self.sparse.is_expert_choice or self.room(n_tokens) is not None
        return dtype == torch.bfloat16 and has_room

    def room(self, n_tokens: int) -> int | None:
        """Rows that hold whatever thresholds let through; None where that is too much to keep."""
        rows = n_tokens * self.sparse.n_experts
        return rows if 0 < rows * self.width <= _ROOM else None

    def threshold_gap(self, kth_score: Tensor) -> Tensor:
        """(), mean |k-th score − threshold| over experts; 0 before there are thresholds."""
        gap = (kth_score - self.threshold).abs().mean()
        return torch.where(gap.isfinite(), gap, torch.zeros_like(gap))

    def begin_step(self, trained_share: float) -> None:
        """Before each optimizer step: the share of all steps that are done (0 … 1)."""
        self.trains_by_threshold = self._trains_by_threshold(trained_share)
        self._forget()  # of a trial pass that no step followed

    def observe_kth_score(self, kth_score: Tensor) -> None:
        """The k-th scores (E,) of one micro-batch."""
        if not self.is_recomputing:
            self._kth_scores.append(kth_score.detach())

    @torch.no_grad()
    def set_threshold(self, threshold: Tensor) -> None:
        """Put thresholds (E,) in the place of the moving average, which goes on from there."""
        self.threshold_updates.clamp_(min=1)
        at_one = ThresholdAverage(torch.ones_like(self.threshold_total), self.threshold_updates)
        self.threshold_total.copy_(threshold / at_one.value(self.sparse.threshold_decay))

    def observe_load(self, chosen: Tensor, scores: Tensor) -> Tensor:
        """The choices and scores (N, E) of one micro-batch; the experts' shares so far (E,)."""
        if not self.is_recomputing:
            self._loads.append(chosen.sum(dim=0))
            if self.sparse.balance == "quantile_bias":
                self._scores.append(scores)
        total = torch.stack(self._loads).sum(dim=0).float()
        return total / total.sum()

    @torch.no_grad()
    def end_step(self) -> None:
        """Move thresholds and biases by what was observed since the last optimizer step."""
        sparse = self.sparse
        if self._kth_scores:
            mean = torch.stack(self._kth_scores).mean(dim=0)
            average = self._average.updated(mean, sparse.threshold_decay)
            self.threshold_total.copy_(average.total)
            self.threshold_updates.copy_(average.updates)
        if self._loads and sparse.balance == "sign_bias":
            load = torch.stack(self._loads).sum(dim=0)
            self.balance_bias.copy_(sign_updated_bias(self.balance_bias, load, sparse.bias_rate))
        if self._scores:
            scores = torch.cat(self._scores)
            self.balance_bias.copy_(
                quantile_updated_bias(self.balance_bias, scores, sparse.top_k, sparse.bias_rate)
            )
        self._forget()

    def _trains_by_threshold(self, trained_share: float) -> bool:
        sparse = self.sparse
        return sparse.routing == "threshold" and trained_share >= sparse.threshold_after

    @property
    def _average(self) -> ThresholdAverage:
        return ThresholdAverage(self.threshold_total, self.threshold_updates)

    def _forget(self) -> None:
        self._kth_scores: list[Tensor] = []
        self._loads: list[Tensor] = []
        self._scores: list[Tensor] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow the model to its device, but stay in float32: bf16 would move the thresholds."""
        before = {name: self._buffers[name] for name in ("threshold_total", "balance_bias")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = self._buffers[name]
            assert moved is not None
            assert kept is not None
            if kept.is_meta:  # nothing to keep: the values come from a checkpoint
                self._buffers[name] = torch.zeros(kept.shape, device=moved.device)
            else:
                self._buffers[name] = kept.to(moved.device)
        return self
