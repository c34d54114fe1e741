"""What transformer blocks keep for the backward pass, reckoned from their shape."""

from dataclasses import dataclass, replace

from pyper.config import ExpertConfig
from pyper.kernels.fp8_activation import ACTIVATIONS as FP8_ACTIVATIONS
from pyper.nn.router_state import RouterState


@dataclass(frozen=True)
class Arithmetic:
    """How blocks are trained."""

    width: int
    """Bytes of a number, 2 or 4."""
    in_fp8: bool
    """Linear maps keep what they read, and their weights, in 8 bits."""
    on_kernels: bool
    """In 16 or 8 bits on a GPU: dense blocks keep less."""

    @property
    def read_width(self) -> int:
        """Bytes of a number as a linear map keeps it."""
        return 1 if self.in_fp8 else self.width


def activation_bytes(model: ExpertConfig, how: Arithmetic, tokens: int, again: int) -> int:
    """Of a micro-batch of `tokens`, over all blocks, the final norm and the head.

    The first `again` blocks keep their input only and compute the rest again.
    """
    again = min(again, model.n_layers)
    total = tokens * how.width * model.d_model * (again + 2)
    for layer in range(again, model.n_layers):
        own = how if layer < _n_plain_blocks(model) else replace(how, in_fp8=False)
        total += tokens * (_of_norms(model, layer, own) + _of_attention(model, own))
        if model.has_sparse_feed_forward(layer):
            total += _of_experts(model, own, tokens)
        else:
            total += tokens * _of_feed_forward(model, own)
    return total


def fp8_weight_bytes(model: ExpertConfig, again: int) -> int:
    """Weights of blocks in 8 bits: each is cast once a pass, and the copy kept. Those of experts
    that choose tokens stay as they are."""
    per_attention = model.dim_per_head * 2 * (model.n_heads + model.kv_heads)
    n_attentions = max(1, model.attention_experts)
    n_matrices = 3 if model.activation == "swiglu" else 2
    total = 0
    for layer in range(again, _n_plain_blocks(model)):
        sparse = model.has_sparse_feed_forward(layer)
        d_ff = model.routing.shared_d_ff if sparse else model.ff_dim
        total += model.d_model * (n_attentions * per_attention + n_matrices * d_ff)
    return total


def _n_plain_blocks(model: ExpertConfig) -> int:
    """Behind them come whole transformers side by side."""
    return model.routing.stem_layers if model.kind == "token_mixture" else model.n_layers


def _of_norms(model: ExpertConfig, layer: int, how: Arithmetic) -> int:
    """Of two: the stream, or what the gain is multiplied into, and what a linear map reads."""
    # a router and experts that choose tokens read all bits
    sparse = model.has_sparse_feed_forward(layer)
    read = how.read_width + (how.width if sparse else how.read_width)
    return model.d_model * (2 * how.width + read)


def _of_attention(model: ExpertConfig, how: Arithmetic) -> int:
    """The fused projection, queries and keys turned, attention's output and what reads it."""
    out = model.dim_per_head * model.n_heads
    values = model.dim_per_head * model.kv_heads
    query_key = out + values
    on_kernels = how.on_kernels and model.kind == "dense"
    as_one = on_kernels
    if how.in_fp8:  # heads in 8 bits come from fewer settings
        as_one = on_kernels and not (model.qk_norm or model.attention_bias)
    copies = 1  # turned in place
    if model.qk_norm:
        copies += 1  # normalised and turned in one pass
    if not as_one:
        copies += 1
    numbers = copies * query_key + values + out
    # without a copy, the projection keeps attention's own output
    is_copied = how.in_fp8 or not on_kernels
    return how.width * numbers + (how.read_width * out if is_copied else 0)


def _of_feed_forward(model: ExpertConfig, how: Arithmetic) -> int:
    """What goes into the activation, and what comes out of it where it is not computed again."""
    width = _activation_width(model)
    if how.in_fp8:
        as_one = model.activation in FP8_ACTIVATIONS and not model.feed_forward_bias
        hidden = 0 if as_one else model.ff_dim  # in 8 bits
        return how.width * (2 * width - model.ff_dim) + hidden
    only_before = how.on_kernels and model.kind == "dense"
    return how.width * (width if only_before else 2 * width)


def _of_experts(model: ExpertConfig, how: Arithmetic, tokens: int) -> int:
    """The same, of the rows that experts choose; of rows that are kept free for them also what
    experts read and what they give."""
    hidden = 2 * _activation_width(model)
    room = _rows_of_room(model, tokens) if how.on_kernels else None
    if room is None:
        return round(how.width * tokens * model.routing.experts_per_token * hidden)
    return how.width * room * (2 * model.d_model + hidden)


def _rows_of_room(model: ExpertConfig, tokens: int) -> int | None:
    """Rows that a routed layer keeps whatever is chosen; None where it keeps those it needs.

    Thresholds may let everything through: every expert then has room for every token.
    """
    sparse = model.routing
    if not sparse.is_expert_choice:
        return tokens * sparse.top_k
    if sparse.routing != "threshold" or sparse.threshold_after >= 1:
        return None
    return RouterState(sparse, _activation_width(model)).room(tokens)


def _activation_width(model: ExpertConfig) -> int:
    """Numbers of a row that go into the activation; as many come out, SwiGLU's gate among them."""
    return (2 if model.activation == "swiglu" else 1) * model.ff_dim
