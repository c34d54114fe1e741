"""Who reads what: pure functions over score tensors. Statistics are returned, never stored."""

from pyper.routing.assignment import (
    Assignment,
    assign_expert_choice,
    assign_greedy,
    assign_with_prices,
)
from pyper.routing.capped_choice import capped_assignment, choose_tokens_capped
from pyper.routing.expert_choice import (
    Gate,
    TokenChoice,
    as_mask,
    capacity_of,
    choose_tokens,
    router_probs,
)
from pyper.routing.layer_statistics import (
    LayerStatistics,
    layer_statistics,
    routing_record,
    routing_summary,
    sum_statistics,
)
from pyper.routing.posterior import (
    keep_top_k,
    mix_log_probs,
    posterior_log_weights,
    prune,
    update_posterior,
)
from pyper.routing.prefix import route_prefix, route_windows, scaled_prices
from pyper.routing.prices import apply_prices
from pyper.routing.thresholds import ThresholdAverage, above_threshold
from pyper.routing.token_choice import (
    choose_experts,
    load_balancing_loss,
    quantile_updated_bias,
    router_z_loss,
    sign_updated_bias,
)

__all__ = [
    "Assignment",
    "Gate",
    "LayerStatistics",
    "ThresholdAverage",
    "TokenChoice",
    "above_threshold",
    "apply_prices",
    "as_mask",
    "assign_expert_choice",
    "assign_greedy",
    "assign_with_prices",
    "capacity_of",
    "capped_assignment",
    "choose_experts",
    "choose_tokens",
    "choose_tokens_capped",
    "keep_top_k",
    "layer_statistics",
    "load_balancing_loss",
    "mix_log_probs",
    "posterior_log_weights",
    "prune",
    "quantile_updated_bias",
    "route_prefix",
    "route_windows",
    "router_probs",
    "router_z_loss",
    "routing_record",
    "routing_summary",
    "scaled_prices",
    "sign_updated_bias",
    "sum_statistics",
    "update_posterior",
]
