"""What `resident.py` serves, and to whom: eight random experts that know different words."""

import os
from functools import partial
from pathlib import Path

import torch

from pyper.checkpoint import write_folder_atomically, write_tensors
from pyper.config import ExpertConfig
from pyper.data import TextTokenizer
from pyper.generate import Request, SamplingConfig
from pyper.mixture import ExpertSource, Mixture, MixtureSettings, save_mixture
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer

STREAMS = ["in runs", "round robin", "top-2"]
N, SIDE_BY_SIDE, PROMPT, WRITTEN = 8, 4, 32, 32
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
TOKENIZER = TextTokenizer.bytes_only()
CONFIG = ExpertConfig(
    vocab_size=32_768 if GPU else 4_096, bos_id=TOKENIZER.bos_id, seq_len=128, n_layers=8,
    d_model=2048 if GPU else 512, n_heads=16 if GPU else 8, d_ff=8192 if GPU else 2048,
)  # fmt: skip
TINY = CONFIG.model_copy(update={"d_model": 128, "n_heads": 1, "d_ff": 512, "n_layers": 1})


def words_of(expert: int) -> range:
    """64 bytes; two experts share them."""
    return range(64 * (expert // 2), 64 * (expert // 2 + 1))


@torch.no_grad()
def random_expert(number: int, config: ExpertConfig) -> Transformer:
    """Likes its words, and ends no text."""
    torch.manual_seed(number)
    with torch.device(DEVICE):
        model = Transformer(config).to(DTYPE)
    for weight in (p for p in model.parameters() if p.ndim == 2):
        weight.normal_(0, 0.005)
    # One channel is the same everywhere, and large: its column in the head is a bias.
    model.embedding.weight[:, 0] = 4.0
    model.head.weight[list(words_of(number)), 0] = 0.2
    model.head.weight[TOKENIZER.bos_id, 0] = -1.0
    return model.eval()


def make_mixture(folder: Path) -> None:
    """`folder/mixture`, whose experts are links to `folder/0` …"""
    for number in range(N):
        model = random_expert(number, CONFIG)
        with write_folder_atomically(folder / str(number)) as temporary:
            write_tensors(temporary / "model.safetensors", model_tensors(model))
    settings = MixtureSettings(
        experts=tuple(f"expert {number}" for number in range(N)),
        tokenizer_fingerprint=TOKENIZER.fingerprint,
        bos_id=TOKENIZER.bos_id,
        seq_len=CONFIG.seq_len,
        router="experts",
        temperature=0.05,  # the two that know a text stay, the others are dropped
    )
    sources = [ExpertSource(CONFIG, folder / str(number)) for number in range(N)]
    save_mixture(folder / "mixture", settings, sources, TOKENIZER)


def counting(mixture: Mixture, folder: Path, cold: bool, loads: list[int]) -> Mixture:
    """The same mixture; who is loaded is noted."""

    def load(number: int) -> Transformer:
        loads.append(number)
        if cold:
            with (folder / str(number) / "model.safetensors").open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return mixture.loaders[number]()

    return mixture.with_loaders([partial(load, number) for number in range(N)])


def requests_of(stream: str) -> list[Request]:
    """Mixed texts come in runs too, of two domains only: with one expert in memory they crawl."""
    torch.manual_seed(0)  # no two begin alike
    is_mixed = stream == "top-2"
    experts = [i % N if stream == "round robin" else i // SIDE_BY_SIDE for i in range(4 * N)]
    experts = [2 * e for e in experts[: 2 * SIDE_BY_SIDE]] if is_mixed else experts
    requests = []
    for expert in experts:
        words = (words_of(expert)[i] for i in torch.randint(64, (PROMPT - 1,)).tolist())
        rule, pinned = SamplingConfig(WRITTEN, 0.0), None if is_mixed else expert
        requests.append(Request((TOKENIZER.bos_id, *words), rule, expert=pinned))
    return requests
