"""Tiny language models, one per expert: as routers, and as the scores of domain discovery."""

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from pyper.config import ExpertConfig, RunConfig, TrainConfig
from pyper.data import Documents
from pyper.evaluate import token_losses
from pyper.nn import Transformer, init_weights
from pyper.train import TrainingData, TrainPlan, branch_schedule, train_expert

# About a hundredth of an expert: routing quality hardly depends on it (arXiv:2410.03529, fig. 4).
_D_MODEL, _N_LAYERS, _N_HEADS = 64, 2, 4
_STEPS, _BATCH, _RATE = 300, 16, 3e-3


def tiny_config(run: RunConfig) -> ExpertConfig:
    """The shape of a tiny model over a (resolved) run's vocabulary."""
    return ExpertConfig(
        vocab_size=run.model.vocab_size,
        bos_id=run.model.bos_id,
        seq_len=run.model.seq_len,
        d_model=_D_MODEL,
        n_layers=_N_LAYERS,
        n_heads=_N_HEADS,
        qk_norm=True,
    )


def train_tiny_lm(
    run: RunConfig,
    documents: Documents,
    folder: Path,
    *,
    name: str,
    device: torch.device,
    console: Console,
) -> Transformer:
    """Train one tiny model on some documents; resumes, or reads the finished one."""
    config = TrainConfig(
        steps=_STEPS,
        global_batch_tokens=_BATCH * run.data.seq_len,
        learning_rate=_RATE,
        optimizer="muon",
        eval_every=_STEPS,
        eval_tokens=run.data.seq_len,
    )
    model = Transformer(tiny_config(run))
    init_weights(model, run.run.random_seed)
    model.to(device)
    data = TrainingData(documents, documents, run.data.seq_len)
    schedule = branch_schedule(config, _STEPS, warm=False)
    plan = TrainPlan(name, _STEPS, schedule, _RATE, random_seed=run.run.random_seed)
    with console.status(f"training a tiny model for {name}"):
        train_expert(model, data, config, plan, folder)
    return model.eval()


def document_scores(models: list[Transformer], documents: Documents, seq_len: int) -> Tensor:
    """Log-likelihoods (N, E) of whole documents, judged by their first `seq_len` predictions.

    The unread rest of a long document is taken to be like its beginning: scores are the mean over
    the predictions that were made, times the length.
    """
    scores = torch.empty(documents.n_documents, len(models))
    for start in range(0, documents.n_documents, 256):
        rows = range(start, min(start + 256, documents.n_documents))
        tokens, is_real = _beginnings(documents, rows, seq_len)
        for e, model in enumerate(models):
            losses = (token_losses(model, tokens) * is_real).sum(dim=1)
            scores[rows.start : rows.stop, e] = -losses / is_real.sum(dim=1).clamp(min=1)
    return scores * torch.from_numpy(documents.lengths).float()[:, None]


def _beginnings(documents: Documents, rows: range, seq_len: int) -> tuple[Tensor, Tensor]:
    """The first tokens (n, T + 1) of some documents, padded, and which predictions are real."""
    longest = int(documents.lengths[rows.start : rows.stop].max())
    T = min(seq_len, max(1, longest - 1))
    tokens = torch.zeros(len(rows), T + 1, dtype=torch.long)
    is_real = torch.zeros(len(rows), T)
    for i, row in enumerate(rows):
        length = min(T + 1, int(documents.lengths[row]))
        tokens[i, :length] = torch.from_numpy(documents.read(row, 0, length).astype("int64"))
        is_real[i, : length - 1] = 1
    return tokens, is_real
