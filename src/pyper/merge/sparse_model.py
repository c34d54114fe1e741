"""Dense experts → one sparse model (BTX, arXiv:2403.07816), and one dense model → a sparse one.

Of every sparse layer the feed-forwards become the experts; with `attention_experts` the attentions
do too (BAM, arXiv:2408.08274). Everything else (embeddings, norms, attention, head) is averaged.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyper.config import ExpertConfig, SparseConfig
from pyper.errors import ConfigError
from pyper.merge.average import average_tensors
from pyper.merge.compatible import check_mergeable
from pyper.merge.routers import init_router_random
from pyper.mixture import build_expert
from pyper.nn import Transformer


def merged_sparse_config(n_experts: int, top_k: int = 2) -> SparseConfig:
    """What merged models are tuned with by default: token choice with gates that sum to one."""
    return SparseConfig(
        n_experts=n_experts,
        routing="token_choice",
        top_k=min(top_k, n_experts),
        normalize_gates=True,
    )


def merge_experts(
    experts: Sequence[Transformer], sparse: SparseConfig | None = None
) -> Transformer:
    """One sparse model of all experts, on the device and in the dtype of the first.

    sparse: `merged_sparse_config` of their number by default. All routers are zero and thresholds
    empty: fit them before use. In evaluation mode.

    Identical experts give the logits of their seed wherever the gates of a token's experts sum to
    one: with `normalize_gates`, with `top_k = n_experts` and softmax gates, and with softmax gates
    while there are no thresholds yet. Elsewhere a feed-forward's output is scaled by that sum.

    Raises ConfigError where `sparse` does not fit, and as `check_mergeable` does.
    """
    config = check_mergeable(experts)
    sparse = sparse or merged_sparse_config(max(len(experts), 2))
    _check_sparse(sparse, len(experts))
    return _assemble(sparse_config_of(config, sparse), experts, experts)


def upcycle(
    dense: Transformer, sparse: SparseConfig, noise_std: float, random_seed: int
) -> Transformer:
    """A sparse model of copies of one dense model (arXiv:2212.05055), with random routers.

    noise_std: standard deviation of Gaussian noise on the experts' matrices, in units of each
    matrix' root mean square; without noise copies differ by what their routers send them alone.
    The same seed gives the same model on every device. Raises as `merge_experts` does.
    """
    if not noise_std >= 0:
        raise ConfigError(f"`noise_std` must not be negative, not {noise_std}", hint="try 0.01")
    config = check_mergeable([dense])
    _check_sparse(sparse, sparse.n_experts)
    model = _assemble(sparse_config_of(config, sparse), [dense] * sparse.n_experts, [dense])
    init_router_random(model, random_seed)
    if noise_std:
        _add_noise(model, noise_std, torch.Generator().manual_seed(random_seed))
    return model


def sparse_config_of(config: ExpertConfig, sparse: SparseConfig) -> ExpertConfig:
    """The same model with sparse layers (validated, which `model_copy` is not)."""
    values = config.model_dump() | {"kind": "sparse", "sparse": sparse.model_dump()}
    return ExpertConfig.model_validate(values)


def _check_sparse(sparse: SparseConfig, n_experts: int) -> None:
    if sparse.n_experts != n_experts:
        raise ConfigError(
            f"`model.sparse.n_experts` is {sparse.n_experts}, but there are {n_experts} experts",
            hint=f"set it to {n_experts}" if n_experts > 1 else "merge two experts at least",
        )
    if sparse.shared_d_ff:
        raise ConfigError(
            "a merged model has no shared feed-forward: nothing was trained to be one",
            hint="leave `model.sparse.shared_d_ff` out",
        )
    if sparse.attention_experts not in (0, n_experts):
        raise ConfigError(
            f"`model.sparse.attention_experts` must be 0 or {n_experts}, "
            f"not {sparse.attention_experts}",
            hint="0 averages the attentions, the number of experts keeps all of them",
        )


def _assemble(
    config: ExpertConfig, experts: Sequence[Transformer], averaged: Sequence[Transformer]
) -> Transformer:
    """Experts' own parts beside the mean of the rest, over `averaged`; routers and state zero."""
    with torch.device("meta"):
        shapes = Transformer(config).state_dict()
    sources = [dict(expert.named_parameters()) for expert in experts]
    # Where names meet but shapes do not, the sparse model stacks the experts' tensors.
    shared = [n for n, p in sources[0].items() if n in shapes and p.shape == shapes[n].shape]
    tensors = average_tensors(averaged, shared)
    like = sources[0]["embedding.weight"]
    for name in shapes.keys() - tensors.keys() - {"head.weight"}:
        tensors[name] = _own_part(name, shapes[name], sources, like)
    return build_expert(config, tensors, device=experts[0].device)


@torch.no_grad()
def _own_part(
    name: str, shape: Tensor, sources: Sequence[Mapping[str, Tensor]], like: Tensor
) -> Tensor:
    """What the experts do not share: stacked feed-forwards, attentions, and fresh routing."""
    if name in sources[0]:
        return torch.stack([source[name].to(like) for source in sources])
    before, found, after = name.partition(".attention.experts.")
    if found:
        number, rest = after.split(".", maxsplit=1)
        return sources[int(number)][f"{before}.attention.{rest}"].to(like)
    return torch.zeros(shape.shape, dtype=shape.dtype, device=like.device)


def _expert_matrices(model: Transformer) -> dict[str, Tensor]:
    """The matrices that are one expert's own, by name; those of feed-forwards stacked (E, …)."""
    return {
        name: p
        for name, p in model.named_parameters()
        if p.ndim == 3 or (".attention.experts." in name and p.ndim == 2)
    }


@torch.no_grad()
def _add_noise(model: Transformer, noise_std: float, generator: torch.Generator) -> None:
    for matrix in _expert_matrices(model).values():
        noise = torch.randn(matrix.shape, generator=generator)  # on the CPU, as in `init_weights`
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        rms = wide.square().mean().sqrt()
        matrix.copy_(wide + noise_std * rms * noise.to(wide))
