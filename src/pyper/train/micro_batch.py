"""How many sequences fit through the model at once."""

import torch

from pyper.config import TrainConfig
from pyper.data import Batch
from pyper.nn import Transformer
from pyper.train.loss import LossFunction
from pyper.train.optimizer import moment_bytes
from pyper.train.step import explain_out_of_memory

# On a CPU larger passes only fall out of the caches.
_CPU_TOKENS = 2048


def choose_micro_batch_size(
    model: Transformer, config: TrainConfig, seq_len: int, loss_fn: LossFunction
) -> int:
    """`micro_batch_size`, or for "auto" the largest divisor of the batch that fits the device.

    Sets the model's `recompute_blocks` as well: "auto" recomputes only where a size that was asked
    for does not fit otherwise. The choice changes speed and memory only: gradients are summed over
    the whole batch.
    """
    batch_size = config.global_batch_tokens // seq_len
    if config.recompute_blocks != "auto":
        model.recompute_blocks = config.recompute_blocks
    if config.micro_batch_size != "auto":
        size = min(config.micro_batch_size, batch_size)
        if config.recompute_blocks == "auto" and model.device.type == "cuda":
            model.recompute_blocks = _fewest_that_fit(model, config, size, seq_len, loss_fn)
        return size
    candidates = [n for n in range(batch_size, 0, -1) if batch_size % n == 0]
    if model.device.type != "cuda":
        limit = max(1, _CPU_TOKENS // seq_len)
        return next(n for n in candidates if n <= limit)
    for size in candidates:
        if _fits(model, config, size, seq_len, loss_fn):
            return size
    return 1


def _fewest_that_fit(
    model: Transformer, config: TrainConfig, size: int, seq_len: int, loss_fn: LossFunction
) -> int:
    """Blocks to recompute: none, a quarter, a half … all."""
    n_blocks = len(model.blocks)
    for quarters in range(4):
        model.recompute_blocks = n_blocks * quarters // 4
        if _fits(model, config, size, seq_len, loss_fn):
            return model.recompute_blocks
    return n_blocks


def _fits(
    model: Transformer, config: TrainConfig, size: int, seq_len: int, loss_fn: LossFunction
) -> bool:
    """Try one forward and backward pass; leaves room for the optimizer's states."""
    before = torch.cuda.memory_allocated(model.device)
    total = torch.cuda.get_device_properties(model.device).total_memory
    tokens = torch.zeros(size, seq_len, dtype=torch.long, device=model.device)
    try:
        loss_fn(model, Batch(tokens, tokens)).objective().backward()
        peak = torch.cuda.max_memory_allocated(model.device)
    except RuntimeError as error:
        if explain_out_of_memory(error, "", size) is None:
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    # Still to come: moments, and float32 sums of gradients where there are several.
    sums = 4 if size * seq_len < config.global_batch_tokens else 0
    states = (moment_bytes(config) + sums) * sum(p.numel() for p in model.parameters())
    return max(peak, before) + states < 0.92 * total
