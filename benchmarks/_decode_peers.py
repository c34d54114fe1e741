"""What `decode.py` compares with: transformers, and a plain loop recorded as a CUDA graph."""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _arcee import arcee_config
from _decode_model import DEVICE, GPU, expert, long_prompt, random_prompt, shape_of, wait
from _timing import as_graph, median_ms
from torch import Tensor

from pyper.generate.usual_layers import after, before, last
from pyper.nn import Transformer
from pyper.nn.rope import rotation


def plain_row(args: argparse.Namespace) -> dict[str, float]:
    """The model in a loop, its step recorded as one graph; attention reads the whole cache."""
    model = expert(args)
    speeds = {}
    for batch in (1, args.batch):
        step = plain_step(args, model, batch)
        run = as_graph(step) if GPU else step
        speeds[f"batch {batch}"] = 1e3 * batch / median_ms(run, repeats=args.context // 4)
    return speeds


def plain_step(args: argparse.Namespace, model: Transformer, batch: int) -> Callable[[int], None]:
    c, dtype = model.config, model.embedding.weight.dtype
    shape = (c.n_layers, batch, c.kv_heads, args.context, c.dim_per_head)
    keys, values = (torch.zeros(shape, device=DEVICE, dtype=dtype) for _ in range(2))
    tokens = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    position = torch.full((1,), args.context - 1, device=DEVICE)

    @torch.no_grad()
    def step(_: int) -> None:
        cos, sin = (
            t.unsqueeze(-2)
            for t in rotation(position, c.dim_per_head, c.rope_theta, c.rope_scaling)
        )
        mask = torch.arange(args.context, device=DEVICE) <= position
        x = model.embedding(tokens)
        for layer, block in enumerate(model.blocks):
            query, key, value = before(block, x, cos, sin)
            keys[layer].index_copy_(2, position, key.unsqueeze(2))
            values[layer].index_copy_(2, position, value.unsqueeze(2))
            mixed = F.scaled_dot_product_attention(
                query.unsqueeze(2), keys[layer], values[layer], attn_mask=mask[None]
            )
            x = after(block, x, mixed.squeeze(2))
        tokens.copy_(last(model, x).argmax(dim=-1))

    return step


def transformers_row(args: argparse.Namespace) -> dict[str, float]:
    from transformers import ArceeForCausalLM

    config = arcee_config(shape_of(args))
    dtype = torch.bfloat16 if GPU else torch.float32
    model = ArceeForCausalLM(config).to(DEVICE, dtype).eval()
    static = {"cache_implementation": "static"} if "static" in args.row else {}

    def write(tokens: Tensor, n_new: int) -> float:
        wait()
        start = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=False,
            pad_token_id=0,
            **static,
        )
        wait()
        return time.perf_counter() - start

    return transformers_speeds(args, write)


def transformers_speeds(
    args: argparse.Namespace, write: Callable[[Tensor, int], float]
) -> dict[str, float]:
    """From the difference of a long and a short text, so that the prompt does not count."""
    speeds = {}
    n_new = args.context // 4
    for batch in (1, args.batch):
        prompts = [random_prompt(args, args.context - n_new, seed) for seed in range(batch)]
        tokens = torch.tensor(prompts, device=DEVICE)
        for _ in range(2):  # the first compiles
            short, long = write(tokens, 2), write(tokens, n_new)
        speeds[f"batch {batch}"] = batch * (n_new - 2) / max(long - short, 1e-9)
    prompt = torch.tensor([long_prompt(args)], device=DEVICE)
    times = sorted(write(prompt, 1) for _ in range(5))
    return speeds | {"first token ms": 1e3 * times[2]}
