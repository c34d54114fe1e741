"""Does an exported folder say what the model says? Asked of a process that knows no Pyper."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyper.data import TextTokenizer
from pyper.errors import CheckpointError, MissingExtraError
from pyper.mixture import LMRouter, Mixture

TOLERANCE = 1e-4
"""Largest difference of two logits, computed in float32 from the weights as they were written."""
_OF_THE_LARGEST = 3e-5  # of large logits more is rounding
_ROWS, _TOKENS = 2, 256


def require_transformers() -> None:
    """Raises MissingExtraError where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise MissingExtraError(
            "transformers", extra="export", needed_for="checking the export (or pass `--no-check`)"
        )


def check_exported(
    folder: Path, mixture: Mixture, tokenizer: TextTokenizer, text: str
) -> dict[str, float]:
    """Compare logits and token ids on real text; the largest difference.

    The mixture's weights become float32. Raises CheckpointError where the folder cannot be loaded,
    says something else, or cuts text otherwise.
    """
    tokens = _windows(tokenizer, text, mixture.settings.seq_len)
    loaded = _load_elsewhere(folder, tokens, text)
    expected = _reference(mixture, tokens)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    if loaded["ids"].tolist() != ids:
        raise CheckpointError(
            "the exported tokenizer gives other tokens than the model's own",
            hint="please report it, with the tokenizer",
        )
    difference = float((loaded["logits"] - expected).abs().max())
    most = max(TOLERANCE, _OF_THE_LARGEST * float(expected.abs().max()))
    if not difference <= most:  # NaN neither
        raise CheckpointError(
            f"the exported model's logits differ by up to {difference:.1e} from the model's own, "
            f"more than {most:.0e}",
            hint="nothing was written; please report it",
        )
    return {"largest_logit_difference": difference, "tokens_compared": tokens.numel()}


def sample_text() -> str:
    """Real text that every installation has: prose and code."""
    return Path(json.__file__).read_text(encoding="utf-8")


def _windows(tokenizer: TextTokenizer, text: str, seq_len: int) -> Tensor:
    """(B, T), each row the beginning of a document."""
    ids, T = tokenizer.encode(text), min(seq_len, _TOKENS)
    parts = [ids[i : i + T - 1] for i in range(0, len(ids), max(T - 1, 1))][:_ROWS]
    full = [part for part in parts if len(part) == T - 1] or [parts[0]]
    return torch.tensor([[tokenizer.bos_id, *part] for part in full])


@torch.no_grad()
def _reference(mixture: Mixture, tokens: Tensor) -> Tensor:
    """(B, T, V), of one model its logits, of several their mixture, in float32."""
    models = [mixture.expert(e).float() for e in range(mixture.n_experts)]
    if isinstance(mixture.router, LMRouter):
        for model in mixture.router.models:
            model.float()
    say = models[0] if len(models) == 1 else mixture.log_probs
    return torch.cat([say(row[None].to(models[0].device)).cpu() for row in tokens])


def _load_elsewhere(folder: Path, tokens: Tensor, text: str) -> dict[str, Tensor]:
    """`export/reload.py` in a process of its own, offline, with module files of its own."""
    with (
        TemporaryDirectory() as scratch,
        resources.as_file(resources.files("pyper.export") / "reload.py") as program,
    ):
        given, out = Path(scratch) / "given.safetensors", Path(scratch) / "out.safetensors"
        raw = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        save_file({"tokens": tokens, "text": raw}, given)
        ended = subprocess.run(
            [sys.executable, "-P", str(program), str(folder), str(given), str(out)],
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
                "TRANSFORMERS_VERBOSITY": "error",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode != 0:
            last = (ended.stderr.strip() or "it says nothing").splitlines()[-1]
            raise CheckpointError(
                f"transformers cannot load what was exported: {last}",
                hint="nothing was written; `--no-check` writes it all the same",
            )
        return load_file(out)
