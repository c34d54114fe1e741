"""A mixture whose experts each know a few sentences by heart: what it writes can be read."""

from pathlib import Path

import torch
import torch.nn.functional as F

from nn.small_experts import small_config
from pyper.checkpoint import write_folder_atomically, write_tensors
from pyper.data import TextTokenizer
from pyper.mixture import ExpertSource, MixtureSettings, save_mixture
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer

TEXTS = {
    "sea": (
        "The harbour lay still before the storm. Gulls sat along the wall and the boats pulled at "
        "their ropes. By evening the wind had turned, and the keeper lit the lamp two hours "
        "early."
    ),
    "law": (
        "The buyer may withdraw within fourteen days. Notice shall be given in writing, and the "
        "seller bears the cost of the return. No fee is due where the goods were not as "
        "described."
    ),
    "kitchen": (
        "Peel the onions and let them soften in butter. Add the flour, then the stock, and stir "
        "until it thickens. Season with salt, a little nutmeg and the juice of half a lemon."
    ),
    "maths": (
        "Let n be an even number. Then n equals two k for some k, so the square of n is four k "
        "squared. It follows that the square of every even number can be divided by four."
    ),
    "code": "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\nprint(mean([1, 2, 3]))\n",
    "sky": (
        "On clear nights the rings of Saturn show in a small telescope. Jupiter stands higher, "
        "and its four bright moons change their places from one evening to the next."
    ),
    "garden": (
        "Sow the beans when the soil is warm. Water them in the morning, keep the snails away, "
        "and pick the pods while they are young. The last ones dry for next year's seed."
    ),
    "letters": (
        "Dear Anna, thank you for the parcel, which came on Tuesday. The children have read both "
        "books already and ask for more. We hope to see you before the summer ends."
    ),
}
CONTEXT = 512


def save_talking_mixture(folder: Path, *, steps: int = 250) -> Path:
    """Eight experts, trained for a second or two each."""
    tokenizer = TextTokenizer.bytes_only()
    sources = []
    for index, text in enumerate(TEXTS.values()):
        tokens = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.bos_id])
        others = "\n".join(other for other in TEXTS.values() if other != text)
        model = _learn(tokens, torch.tensor(tokenizer.encode(others)), index, steps)
        sources.append(_save(model, folder / f"expert{index}"))
    settings = MixtureSettings(
        experts=tuple(TEXTS),
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id,
        seq_len=CONTEXT,
        router="experts",
        mixing="window",  # a conversation may change its subject
        window=12,
    )
    save_mixture(folder / "eight-voices", settings, sources, tokenizer)
    return folder / "eight-voices"


def _learn(tokens: torch.Tensor, others: torch.Tensor, seed: int, steps: int) -> Transformer:
    torch.manual_seed(seed)
    config = small_config(
        vocab_size=257, seq_len=CONTEXT, d_model=64, n_layers=2, n_heads=4, d_ff=192
    )
    model = Transformer(config)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.08)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        # After nothing, and after something foreign: an answer follows on what others said.
        length = int(torch.randint(1, 240, (1,), generator=generator))
        start = int(torch.randint(0, len(others) - length, (1,), generator=generator))
        after = torch.cat([tokens[:1], others[start : start + length], tokens[1:]])
        loss = _loss(model, tokens, 0) + _loss(model, after, length)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _loss(model: Transformer, tokens: torch.Tensor, skipped: int) -> torch.Tensor:
    logits = model(tokens[None, :-1])[0, skipped:]
    return F.cross_entropy(logits, tokens[1 + skipped :])


def _save(model: Transformer, folder: Path) -> ExpertSource:
    with write_folder_atomically(folder) as temporary:
        (temporary / "config.json").write_text(model.config.model_dump_json())
        write_tensors(temporary / "model.safetensors", model_tensors(model))
    return ExpertSource(model.config, folder)
