"""`--draft`: a small model that guesses what a mixture writes."""

from pathlib import Path

import torch

from pyper.data import TextTokenizer
from pyper.errors import CheckpointError, ConfigError, TokenizerError
from pyper.generate import Drafter, ModelDrafter, RouterDrafter
from pyper.mixture import LMRouter, Mixture
from pyper.mixture.expert_folder import build_expert
from pyper.stages.start import open_start

ROUTER = "router"


def open_drafter(
    draft: str, mixture: Mixture, tokenizer: TextTokenizer, device: torch.device
) -> Drafter:
    """Who guesses for a mixture: `router`, or the one model in a folder.

    That is a run or mixture of one, one of a mixture's experts, or a checkpoint inside its run.
    Raises CheckpointError, ConfigError for a router that is no language model and for a mixture of
    several, TokenizerError for a model of another tokenizer.
    """
    n_tokens = tokenizer.vocab_size
    if draft == ROUTER:
        return RouterDrafter(_router_of(mixture).models, n_tokens)
    path = Path(draft)
    if not path.exists():
        raise CheckpointError(
            f"`--draft`: there is no {path}",
            hint=f"pass the folder of a small model, or `{ROUTER}`",
        )
    start = open_start(path, None, "--draft")
    _check_tokenizer(path, start.tokenizer, tokenizer.fingerprint)
    tensors = start.load()
    keep = device.type == "cpu"  # the mapped file itself
    return ModelDrafter(build_expert(start.config, tensors, device=device, keep=keep), n_tokens)


def _router_of(mixture: Mixture) -> LMRouter:
    if isinstance(mixture.router, LMRouter):
        return mixture.router
    raise ConfigError(
        f"`--draft {ROUTER}`: the mixture's router is `{mixture.settings.router}`, which is no "
        "language model of its own",
        hint='mix with `mixture.router = "lm"`, or pass the folder of a small model',
    )


def _check_tokenizer(path: Path, own: str | None, wanted: str) -> None:
    if own is None:
        raise TokenizerError(
            f"`--draft`: nothing says which tokenizer {path} was trained with",
            hint="pass it where it stands in its run, or an expert of a mixture",
        )
    if own != wanted:
        raise TokenizerError(
            f"`--draft`: {path} was trained with another tokenizer than the model: the same ids "
            "mean other words",
            hint="train a small model on the same data (`pyper prepare` once, two runs)",
        )
