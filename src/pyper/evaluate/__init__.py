"""Held-out losses by domain, beside the dense control, for every mixing mode."""

from pyper.evaluate.losses import (
    HeldOut,
    domain_losses,
    held_out_windows,
    mean_loss,
    token_losses,
)
from pyper.evaluate.mixture_losses import (
    Scores,
    fit_temperature,
    losses_of_modes,
    score_held_out,
)
from pyper.evaluate.report import evaluation_report
from pyper.evaluate.routing_report import routing_report
from pyper.evaluate.table import domains_table, results_table

__all__ = [
    "HeldOut",
    "Scores",
    "domain_losses",
    "domains_table",
    "evaluation_report",
    "fit_temperature",
    "held_out_windows",
    "losses_of_modes",
    "mean_loss",
    "results_table",
    "routing_report",
    "score_held_out",
    "token_losses",
]
