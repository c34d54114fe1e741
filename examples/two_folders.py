"""A mixture from two folders of text, end to end: prepare, train, mix, evaluate, write.

    python examples/two_folders.py texts/law texts/novels

Each folder is a domain and gets an expert. Without folders it makes up two small ones. What it
trains, `runs/two-folders`, is what the other examples open.
"""

import random
import sys
from pathlib import Path

import pyper

WORDS = {
    "sums": ["one", "two", "three", "four", "five", "plus", "minus", "times", "makes"],
    "tales": ["the", "fox", "and", "crow", "met", "by", "a", "mill", "near", "sea"],
}


def make_up(folder: Path) -> list[Path]:
    """Two hundred short documents of each domain."""
    rng = random.Random(0)
    for domain, words in WORDS.items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for number in range(200):
            text = f"{number}: {' '.join(rng.choices(words, k=24))}."
            (folder / domain / f"{number:03d}.txt").write_text(text)
    return [folder / domain for domain in WORDS]


folders = [Path(name) for name in sys.argv[1:]] or make_up(Path("texts"))
data = pyper.prepare(folders, "data/two-folders", vocab_size=320)
run = {
    "run": {"folder": "runs/two-folders"},
    "data": {"path": str(data), "seq_len": 32},
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 2},
    "mixture": {"n_experts": len(folders), "assign": "folder"},
    "train": {"steps": 160, "global_batch_tokens": 512, "learning_rate": 5e-3},
}
model = pyper.load(pyper.train_run(run, progress=True))

report = pyper.evaluate_run("runs/two-folders")
print(f"{report['control']:.3f} nats per token by the dense control")
print(f"{report['posterior']['top2']:.3f} by the mixture of {', '.join(model.experts)}")
for prompt in ("1: two plus", "2: the fox"):
    print(f"{prompt}|{model.generate(prompt, max_new_tokens=12)}")
