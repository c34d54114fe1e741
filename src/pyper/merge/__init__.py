"""Several dense experts into one model: sparse layers of their feed-forwards, or mean weights."""

from pyper.merge.add_expert import add_expert
from pyper.merge.average import average_weights
from pyper.merge.common_seed import (
    Loss,
    barrier,
    barriers,
    check_common_seed,
    check_kinship,
    likeness,
)
from pyper.merge.compatible import check_mergeable
from pyper.merge.routers import (
    fit_router_means,
    fit_router_ridge,
    init_router_random,
    ridge_solution,
)
from pyper.merge.sparse_model import merge_experts, merged_sparse_config, upcycle

__all__ = [
    "Loss",
    "add_expert",
    "average_weights",
    "barrier",
    "barriers",
    "check_common_seed",
    "check_kinship",
    "check_mergeable",
    "fit_router_means",
    "fit_router_ridge",
    "init_router_random",
    "likeness",
    "merge_experts",
    "merged_sparse_config",
    "ridge_solution",
    "upcycle",
]
