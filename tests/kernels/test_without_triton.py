"""Triton is optional: CPU builds of torch come without it."""

import subprocess
import sys

SCRIPT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from pyper.kernels import expert_choice_layer, runs_triton
assert not runs_triton(torch.ones(1))
weights = torch.ones(2, 3), torch.ones(2, 4, 3), torch.ones(2, 3, 4)
out = expert_choice_layer(torch.ones(5, 3), None, *weights, 2).out
assert out.shape == (5, 3)
assert "triton" not in sys.modules
"""


def test_layers_run_where_triton_is_not_installed() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
