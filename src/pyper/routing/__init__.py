"""Who reads what: pure functions over score tensors. Statistics are returned, never stored."""

from pyper.routing.assignment import (
    Assignment,
    assign_expert_choice,
    assign_greedy,
    assign_with_prices,
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

__all__ = [
    "Assignment",
    "apply_prices",
    "assign_expert_choice",
    "assign_greedy",
    "assign_with_prices",
    "keep_top_k",
    "mix_log_probs",
    "posterior_log_weights",
    "prune",
    "route_prefix",
    "route_windows",
    "scaled_prices",
    "update_posterior",
]
