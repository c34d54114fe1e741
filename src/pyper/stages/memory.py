"""What training one expert keeps in memory, part by part, reckoned from its run file."""

from pyper.config import ExpertConfig, RunConfig
from pyper.nn import count_parameters
from pyper.train.optimizer import moment_bytes

# Logits that the head makes at a time (`kernels/cross_entropy.py`), and their bytes: a float32 copy
# beside each, or with kernels the next ones before the last are gone.
_LOGITS_AT_ONCE = 2**27


def training_memory(run: RunConfig, *, on_kernels: bool = False) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer states and activations, and of their peak.

    Gradients come as activations go: the peak, "total", has the larger of the two.
    Activations are those of one micro-batch (where its size is "auto", of the whole batch) with
    attention that keeps no scores. The formula is that of blocks that are not compiled: with as
    many keys as queries 11 D + 2 F numbers per token and block; a recomputed block keeps its input
    only, a sparse one 2 F for every expert that reads a token. on_kernels: as dense blocks train in
    bf16 on a GPU, 8 D + F. Not in it: the workspace of libraries, 1 GB at most on a GPU, and what
    the allocator cannot use.
    """
    train = run.train
    parameters = count_parameters(run.model)
    half = train.precision != "fp32"
    width = 2 if half else 4
    rows = max(1, train.global_batch_tokens // run.data.seq_len)
    size = rows if train.micro_batch_size == "auto" else min(train.micro_batch_size, rows)
    tokens = size * run.data.seq_len
    parts = {
        "weights": parameters * width,
        "low_halves": parameters * 2 if half and train.weights == "split" else 0,
        "gradients": parameters * width,
        # a second micro-batch is added to the first in float32
        "gradient_sums": parameters * 4 if half and size < rows else 0,
        "moments": parameters * moment_bytes(train),
        "activations": tokens
        * _bytes_per_token(run.model, width, train.recompute_blocks, on_kernels and half),
        "logits": min(tokens * run.model.vocab_size, _LOGITS_AT_ONCE)
        * (2 * width if on_kernels and half else width + 4),
    }
    going = parts["activations"] + parts["logits"]
    total = sum(parts.values()) - min(going, parts["gradients"])
    return parts | {"total": total}


def _bytes_per_token(
    model: ExpertConfig, width: int, recompute: int | str, on_kernels: bool
) -> int:
    """Of one micro-batch, over all blocks, the final norm and the head."""
    again = 0 if recompute == "auto" else min(int(recompute), model.n_layers)
    heads = model.dim_per_head * (model.n_heads + model.kv_heads)
    # two norms (their output, and what it is multiplied into), the fused projection, what is
    # turned, attention's output and the copy that its projection reads
    attention = 4 * model.d_model + heads + model.dim_per_head * model.kv_heads + heads
    attention += 2 * model.dim_per_head * model.n_heads
    if model.qk_norm:
        attention += heads
    hidden = (4 if model.activation == "swiglu" else 2) * model.ff_dim
    if on_kernels and model.kind == "dense":
        # the stream and its norm twice, the projection that is turned in place, attention's output
        values = model.dim_per_head * model.kv_heads
        own = 4 * model.d_model + heads + values + model.dim_per_head * model.n_heads
        attention = attention if model.qk_norm else own
        hidden //= 2  # only what comes before the activation
    total = 0
    for layer in range(again, model.n_layers):
        experts = 1.0
        if model.kind != "dense" and model.has_sparse_feed_forward(layer):
            experts = model.routing.experts_per_token
        total += round(width * (attention + experts * hidden))
    return total + width * model.d_model * (again + 2)
