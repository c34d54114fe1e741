"""Train one expert on your own strings, and let it write.

    python examples/train_on_strings.py

Nothing stays on the disk: with `folder="runs/proverbs"` the expert would, and training would go on
where it was stopped.
"""

import random

import pyper

BEGIN = [
    "a bird in the hand",
    "a stitch in time",
    "a rolling stone",
    "a watched pot",
    "the early bird",
]
END = [
    "gathers no moss",
    "never boils",
    "catches the worm",
    "saves nine",
    "is worth two in the bush",
]


def proverbs(n: int) -> list[str]:
    """Each is one document."""
    rng = random.Random(0)
    return [
        " ".join(f"{begin} {rng.choice(END)};" for begin in rng.choices(BEGIN, k=8))
        for _ in range(n)
    ]


model = pyper.train_expert(
    proverbs(200),
    pyper.ExpertConfig(d_model=48, n_layers=2, n_heads=4),
    pyper.TrainConfig(steps=120, global_batch_tokens=512, learning_rate=5e-3, eval_every=40),
    seq_len=32,
    vocab_size=320,
    progress=True,
)

for seed in range(3):
    print("a bird" + model.generate("a bird", max_new_tokens=24, stop=[";"], seed=seed))
for text in ("the early bird catches the worm;", "worm the catches bird early the;"):
    print(f"{model.score(text).bits_per_byte:.2f} bits per byte: {text}")
