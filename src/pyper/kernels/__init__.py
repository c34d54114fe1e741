"""Kernels of the sparse layer and of the head: each beside its twin in plain torch.

The twin has the same signature, is what runs without a GPU, and is the reference of the tests.
"""

from pyper.kernels.activation import activate_rows, activate_rows_torch
from pyper.kernels.choice import Choice, choose, slots_of, slots_of_torch
from pyper.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_torch
from pyper.kernels.expert_choice import (
    ExpertChoiceOutput,
    expert_choice_layer,
    expert_choice_layer_torch,
    expert_feed_forward,
    expert_feed_forward_torch,
)
from pyper.kernels.launch import runs_triton
from pyper.kernels.paged_attention import paged_attention, paged_attention_torch
from pyper.kernels.router import router_gates, router_gates_torch
from pyper.kernels.rows import combine_rows, combine_rows_torch, gather_rows, gather_rows_torch

__all__ = [
    "Choice",
    "ExpertChoiceOutput",
    "activate_rows",
    "activate_rows_torch",
    "choose",
    "combine_rows",
    "combine_rows_torch",
    "expert_choice_layer",
    "expert_choice_layer_torch",
    "expert_feed_forward",
    "expert_feed_forward_torch",
    "gather_rows",
    "gather_rows_torch",
    "linear_cross_entropy",
    "linear_cross_entropy_torch",
    "paged_attention",
    "paged_attention_torch",
    "router_gates",
    "router_gates_torch",
    "runs_triton",
    "slots_of",
    "slots_of_torch",
]
