"""Routers of a merged model, without training.

A row of a router is the direction in which its expert's domain lies, as its layer sees it. All
rows of a layer are stretched by one factor: the one at which the mean of the tokens' highest
softmax gate, over the samples, is `top_gate`. By default that is the share of the tokens that the
layer's router gets right, so that it is as sure as it can be: on text that is far from 1 (0.6 to
0.65 for three domains in bytes), and surer routers gave higher losses with normalised gates (0.6,
0.8, 0.95: 1.92, 1.94, 1.98 nats). Gates that are not normalised shrink what they weigh: there
surer was better at first (expert choice: 2.36, 2.18, 2.09). Near 1 a softmax is flat and hardly
learns.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyper.errors import ConfigError
from pyper.merge.thresholds import calibrate_layer, clear_thresholds
from pyper.merge.walk import (
    Routed,
    check_one_sample_per_expert,
    expert_of_token,
    routed_layers,
    visit_routers,
)
from pyper.nn import Transformer
from pyper.nn.sparse_feed_forward import SparseFeedForward

# Even where a router gets all samples right.
_SUREST = 0.95

RowsOf = Callable[[Tensor, Tensor], Tensor]
"""Rows (E, D), relative to each other, from inputs (N, D) and the expert (N,) of each."""


def fit_router_ridge(
    model: Transformer,
    samples: Sequence[Tensor],
    *,
    ridge: float = 0.01,
    top_gate: float | None = None,
    normalize_rows: bool = False,
) -> dict[str, float]:
    """Fit every router in place to tell the experts' domains apart, by `ridge_solution`.

    samples: one token tensor (n, T) of each expert's own domain, in the order of the experts, best
    of equal numbers of tokens and of more tokens together than the model is wide. Layers are
    fitted front to back, each on what it reads when all layers before it route; thresholds are
    calibrated along the way, as by `Transformer.calibrate_thresholds`. Attentions that are mixed,
    but fewer than the experts (after `add_expert`), are left as they are.

    normalize_rows: give all rows of a layer one length first. Without an intercept the lengths are
    part of the fit: on made-up domains in random models up to 7 in 100 tokens more went to a wrong
    expert; on text it mattered little, either way.

    Returns, by layer, the share of the samples' tokens whose highest router logit is that of their
    own expert. Raises DataError for samples that do not fit, ConfigError for arguments out of
    range.
    """
    n_experts = model.config.routing.n_experts

    def rows(x: Tensor, expert: Tensor) -> Tensor:
        solution = ridge_solution(x, expert, n_experts, ridge).T
        return F.normalize(solution, dim=-1) if normalize_rows else solution

    return _fit(model, samples, rows, top_gate)


def fit_router_means(
    model: Transformer, samples: Sequence[Tensor], *, top_gate: float | None = None
) -> dict[str, float]:
    """Like `fit_router_ridge`, with rows from the mean of all to the mean of a domain.

    All of one length.
    """
    n_experts = model.config.routing.n_experts

    def rows(x: Tensor, expert: Tensor) -> Tensor:
        return F.normalize(centred_means(x, expert, n_experts), dim=-1)

    return _fit(model, samples, rows, top_gate)


@torch.no_grad()
def init_router_random(model: Transformer, random_seed: int) -> None:
    """Fill every router in place with N(0, init_std²), and empty all thresholds.

    The same seed gives the same routers on every device.
    """
    generator = torch.Generator().manual_seed(random_seed)
    for layer in routed_layers(model).values():
        weight = torch.randn(layer.router.weight.shape, generator=generator)
        layer.router.weight.copy_(weight * model.config.init_std)
        if isinstance(layer, SparseFeedForward):
            clear_thresholds(layer)


def ridge_solution(x: Tensor, expert: Tensor, n_experts: int, ridge: float) -> Tensor:
    """W = (XᵀX + λI)⁻¹XᵀY (D, E) in float64, of inputs x (N, D) and their experts (N,).

    Y is one-hot by expert, λ is `ridge`: there is no intercept, as routers have none. Raises
    ConfigError unless λ is positive.
    """
    return ridge_regression(x, F.one_hot(expert, n_experts), ridge)


def ridge_regression(x: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The same for any targets (N, E)."""
    if not ridge > 0:
        raise ConfigError(f"`ridge` must be positive, not {ridge}", hint="try 0.01")
    wide = _precise(x)
    gram = wide.T @ wide
    gram.diagonal().add_(ridge)
    solution: Tensor = torch.linalg.solve(gram, wide.T @ targets.to(wide))
    return solution


def centred_means(x: Tensor, expert: Tensor, n_experts: int) -> Tensor:
    """(E, D) in float64: the mean of each expert's inputs minus the mean of these means."""
    wide = _precise(x)
    targets = F.one_hot(expert.to(wide.device), n_experts).to(wide)
    means = targets.T @ wide / targets.sum(dim=0).unsqueeze(1)
    return means - means.mean(dim=0)


def factor_for_top_gate(unit_logits: Tensor, top_gate: float) -> float:
    """The factor at which the mean of the highest softmax gate of logits (N, E) is `top_gate`.

    It grows with the factor, so halving finds it; between 1e-3 and 1e6.
    """
    low, high = -3.0, 6.0
    for _ in range(40):
        middle = (low + high) / 2
        gates = (unit_logits * 10**middle).softmax(dim=-1)
        if float(gates.amax(dim=-1).mean()) < top_gate:
            low = middle
        else:
            high = middle
    return float(10**low)


def _fit(
    model: Transformer, samples: Sequence[Tensor], rows_of: RowsOf, top_gate: float | None
) -> dict[str, float]:
    n_experts = model.config.routing.n_experts
    check_one_sample_per_expert(samples, n_experts)
    if top_gate is not None and not 1 / n_experts < top_gate < 1:
        raise ConfigError(
            f"`top_gate` must be between {1 / n_experts:g} and 1, not {top_gate}",
            hint="leave it out: routers are then as sure as they are right",
        )
    expert = expert_of_token(samples)
    agreement: dict[str, float] = {}

    def visit(name: str, layer: Routed, x: Tensor) -> None:
        if len(layer.router.weight) != n_experts:  # attentions of a model with an added expert
            return
        unit = _of_mean_length_one(rows_of(x, expert)).to(x.device)
        logits = x.float() @ unit.T
        right = float((logits.argmax(dim=-1).cpu() == expert).float().mean())
        gate = top_gate or min(max(right, 1 / n_experts), _SUREST)
        layer.router.weight.copy_(unit * factor_for_top_gate(logits, gate))
        calibrate_layer(layer, x)
        agreement[name] = right

    visit_routers(model, samples, visit)
    return agreement


def _of_mean_length_one(rows: Tensor) -> Tensor:
    scaled: Tensor = rows / rows.norm(dim=-1).mean()
    return scaled.float()


def _precise(x: Tensor) -> Tensor:
    """In float64; on the CPU where the device has none."""
    return x.to("cpu" if x.device.type == "mps" else x.device).double()
