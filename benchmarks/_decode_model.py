"""The expert of `decode.py`, its prompts, and what its peers are given too."""

import argparse

import torch

from pyper.config import ExpertConfig
from pyper.nn import Transformer, init_weights

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def shape_of(args: argparse.Namespace) -> ExpertConfig:
    return ExpertConfig(
        vocab_size=args.vocabulary,
        seq_len=2048 if GPU else 256,
        bos_id=0,
        d_model=args.width,
        n_layers=args.layers,
        n_heads=max(1, args.width // 128),
        d_ff=4 * args.width,
    )


def expert(args: argparse.Namespace, seed: int = 0) -> Transformer:
    with torch.device(DEVICE):
        model = Transformer(shape_of(args)).to(torch.bfloat16 if GPU else torch.float32)
    init_weights(model, seed)
    with torch.no_grad():  # some begin as zeros, which memory moves faster than numbers
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model.eval()


def random_prompt(args: argparse.Namespace, length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, args.vocabulary, (length,), generator=generator).tolist()


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def long_prompt(args: argparse.Namespace) -> list[int]:
    return random_prompt(args, min(1024, shape_of(args).seq_len // 2), seed=99)
