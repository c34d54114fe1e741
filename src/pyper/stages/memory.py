"""What training one expert keeps in memory, part by part, reckoned from its run file."""

from pyper.config import RunConfig
from pyper.nn import count_parameters
from pyper.stages.block_memory import Arithmetic, activation_bytes, fp8_weight_bytes
from pyper.train.optimizer import moment_bytes

# Logits that the head makes at a time (`kernels/cross_entropy.py`), and their bytes: a float32 copy
# beside each, or with kernels the next ones before the last are gone.
_LOGITS_AT_ONCE = 2**27


def training_memory(run: RunConfig, *, on_kernels: bool = False) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer states, activations and workspace, and of their peak.

    Gradients come as activations go: the peak, "total", has the larger of the two.
    Activations are those of one micro-batch (where its size is "auto", of the whole batch) with
    attention that keeps no scores. The formula is that of blocks that are not compiled: with as
    many keys as queries 11 D + 2 F numbers per token and block; a recomputed block keeps its input
    only, a sparse one 2 F for every expert that reads a token. on_kernels: as dense blocks train in
    bf16 on a GPU, 8 D + F. In fp8 linear maps keep what they read, and their weights, in 8 bits.
    A layer that trains by thresholds on kernels keeps 2 D + 2 F for every token and expert, needed
    or not, where `RouterState.room` allows it. The workspace is that of the head, its logits. Not
    in it: that of libraries (0.1 GB on a GPU), and what the allocator cannot use.
    """
    train = run.train
    parameters = count_parameters(run.model)
    half = train.precision != "fp32"
    width = 2 if half else 4
    rows = max(1, train.global_batch_tokens // run.data.seq_len)
    size = rows if train.micro_batch_size == "auto" else min(train.micro_batch_size, rows)
    tokens = size * run.data.seq_len
    how = Arithmetic(width, in_fp8=train.precision == "fp8", on_kernels=on_kernels and half)
    again = 0 if train.recompute_blocks == "auto" else train.recompute_blocks
    parts = {
        "weights": parameters * width,
        "low_halves": parameters * 2 if half and train.weights == "split" else 0,
        "gradients": parameters * width,
        # a second micro-batch is added to the first in float32
        "gradient_sums": parameters * 4 if half and size < rows else 0,
        "moments": parameters * moment_bytes(train),
        "activations": activation_bytes(run.model, how, tokens, again),
        "fp8_weights": fp8_weight_bytes(run.model, again) if how.in_fp8 else 0,
        "workspace": min(tokens * run.model.vocab_size, _LOGITS_AT_ONCE)
        * (2 * width if how.on_kernels else width + 4),
    }
    going = parts["activations"] + parts["fp8_weights"] + parts["workspace"]
    total = sum(parts.values()) - min(going, parts["gradients"])
    return parts | {"total": total}
