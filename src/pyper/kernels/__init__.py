"""Kernels of layers, head, optimizer and decoding: each beside its twin in plain torch.

The twin has the same signature, is what runs without a GPU, and is the reference of the tests.
"""

from pyper.kernels.activation import activate, activate_rows, activate_rows_torch
from pyper.kernels.adamw import AdamWSettings, AdamWTensors, adamw_step, adamw_step_torch
from pyper.kernels.choice import Choice, choose, slots_of, slots_of_torch
from pyper.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_torch
from pyper.kernels.expert_choice import (
    ExpertChoiceOutput,
    expert_choice_layer,
    expert_choice_layer_torch,
    expert_feed_forward,
    expert_feed_forward_torch,
)
from pyper.kernels.feed_forward import dense_feed_forward, dense_feed_forward_torch
from pyper.kernels.gradient_norm import gradient_norm, gradient_norm_torch
from pyper.kernels.heads import normed_heads, normed_heads_torch
from pyper.kernels.launch import runs_triton
from pyper.kernels.momentum import add_updates, add_updates_torch, nesterov, nesterov_torch
from pyper.kernels.multi_tensor import TableCache
from pyper.kernels.paged_attention import Turn, paged_attention, paged_attention_torch
from pyper.kernels.rms_norm import add_norm, add_norm_torch, norm_alone
from pyper.kernels.rotary import rotated_heads, rotated_heads_torch
from pyper.kernels.rounding import join_weight, split_weight
from pyper.kernels.router import router_gates, router_gates_torch
from pyper.kernels.rows import combine_rows, combine_rows_torch, gather_rows, gather_rows_torch
from pyper.kernels.state_8bit import Moment
from pyper.kernels.thin_linear import InputNorm, ThinWeight, thin_linear, thin_linear_torch

__all__ = [
    "AdamWSettings",
    "AdamWTensors",
    "Choice",
    "ExpertChoiceOutput",
    "InputNorm",
    "Moment",
    "TableCache",
    "ThinWeight",
    "Turn",
    "activate",
    "activate_rows",
    "activate_rows_torch",
    "adamw_step",
    "adamw_step_torch",
    "add_norm",
    "add_norm_torch",
    "add_updates",
    "add_updates_torch",
    "choose",
    "combine_rows",
    "combine_rows_torch",
    "dense_feed_forward",
    "dense_feed_forward_torch",
    "expert_choice_layer",
    "expert_choice_layer_torch",
    "expert_feed_forward",
    "expert_feed_forward_torch",
    "gather_rows",
    "gather_rows_torch",
    "gradient_norm",
    "gradient_norm_torch",
    "join_weight",
    "linear_cross_entropy",
    "linear_cross_entropy_torch",
    "nesterov",
    "nesterov_torch",
    "norm_alone",
    "normed_heads",
    "normed_heads_torch",
    "paged_attention",
    "paged_attention_torch",
    "rotated_heads",
    "rotated_heads_torch",
    "router_gates",
    "router_gates_torch",
    "runs_triton",
    "slots_of",
    "slots_of_torch",
    "split_weight",
    "thin_linear",
    "thin_linear_torch",
]
