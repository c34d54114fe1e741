"""Exported folders, opened by `transformers` in this process and in one without Pyper."""

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.small_stock import transformers
from pyper.data import TextTokenizer
from pyper.generate import SamplingConfig, complete
from pyper.mixture import Mixture

BYTES = TextTokenizer.bytes_only()
# What `transformers` calls a cache, by its release.
_FIELDS = transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if "cache" in _FIELDS else "past_key_values"
PROMPTS = ("The fox", "a", "def main(arguments):\n    ", "")


def open_elsewhere(folder: Path, **options: Any) -> Any:
    """The model of an exported folder; every weight must be in its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True, **options
        )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """(B, T, V)."""
    logits: Tensor = model(input_ids=tokens, **options).logits
    return logits


@torch.no_grad()
def stepwise_logits(model: Any, tokens: Tensor, first: int = 5, **options: Any) -> Tensor:
    """The same, read through the cache: a beginning, then a token at a time."""
    out = model(input_ids=tokens[:, :first], use_cache=True, **options)
    parts = [out.logits]
    for at in range(first, tokens.shape[1]):
        step = tokens[:, at : at + 1]
        out = model(input_ids=step, use_cache=True, **{CACHE: getattr(out, CACHE)})
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def left_padded(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Prompts behind the document token, as a batch."""
    rows = [[BYTES.bos_id, *BYTES.encode(prompt)] for prompt in prompts]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[BYTES.bos_id] * (longest - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows]),
    }


def greedy_by_engine(mixture: Mixture, prompts: Sequence[str], n: int) -> list[list[int]]:
    """New tokens after each prompt, by Pyper's own engine."""
    sampling = SamplingConfig(max_new_tokens=n, temperature=0.0)
    done = complete(mixture, BYTES, prompts, sampling)
    return [[p.token for p in row.pieces if p.token is not None] for row in done]


def greedy_elsewhere(model: Any, prompts: Sequence[str], n: int, **options: Any) -> list[list[int]]:
    """New tokens after each prompt, by `generate`, all prompts in one batch."""
    batch = left_padded(prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(**batch, max_new_tokens=n, do_sample=False, **options)
    return [until_end(row) for row in out[:, batch["input_ids"].shape[1] :].tolist()]


def until_end(tokens: list[int]) -> list[int]:
    """Up to and with the first document token."""
    at = tokens.index(BYTES.bos_id) + 1 if BYTES.bos_id in tokens else len(tokens)
    return tokens[:at]


def generate_without_pyper(folder: Path, batch: dict[str, Tensor], n: int, modules: Path) -> Any:
    """`generate` in an interpreter that starts without site settings and cannot import Pyper."""
    code = (
        "import json, sys\n"
        "sys.modules['pyper'] = None\n"
        "import torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "given = json.loads(sys.stdin.read())\n"
        "batch = {k: torch.tensor(v) for k, v in given['batch'].items()}\n"
        "model = AutoModelForCausalLM.from_pretrained(given['folder'], trust_remote_code=True)\n"
        "out = model.generate(**batch, max_new_tokens=given['n'], do_sample=False)\n"
        "assert not any(name.startswith('pyper.') for name in sys.modules)\n"
        "print(json.dumps(out[:, batch['input_ids'].shape[1]:].tolist()))\n"
    )
    given = {
        "folder": str(folder),
        "n": n,
        "batch": {name: tensor.tolist() for name, tensor in batch.items()},
    }
    ended = subprocess.run(
        [sys.executable, "-I", "-c", code],
        input=json.dumps(given),
        env={"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [until_end(row) for row in json.loads(ended.stdout)]
