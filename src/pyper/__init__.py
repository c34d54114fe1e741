"""Pyper trains, mixes, evaluates and runs tiny mixtures of experts.

Shapes are named by one legend everywhere: B batch, T time, D d_model, F d_ff, H heads,
K head_dim, V vocabulary, E experts, C capacity, N = B·T tokens.
"""

__version__ = "0.1.0"
