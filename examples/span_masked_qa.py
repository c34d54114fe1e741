"""Train one expert on questions and answers, and let only the answers count.

    python examples/span_masked_qa.py

The loop of `pyper.train` does not know about tasks. A `batch_transform` sees every batch before the
model does; here it gives the tokens of answers a weight of 1 and all others a weight of 0. The
model still reads the questions, but learns nothing about how to ask them.
"""

import random
import sys
from pathlib import Path

from pyper.config import ExpertConfig, PrepareConfig, TrainConfig
from pyper.data import Batch, TextTokenizer, TokenData, prepare
from pyper.nn import Transformer, init_weights
from pyper.train import TrainingData, TrainPlan, TrainResult, branch_schedule, train_expert

SEQ_LEN = 32
ANSWER, END = TextTokenizer.bytes_only().encode("=;")  # one token per byte


def write_questions(folder: Path, documents: int = 200) -> Path:
    """Documents such as `3+4=7;1+1=2;…`."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        pairs = [(rng.randint(0, 4), rng.randint(0, 4)) for _ in range(12)]
        text = "".join(f"{a}+{b}={a + b};" for a, b in pairs)
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def weigh_answers(batch: Batch) -> Batch:
    """Weight 1 for the targets after `=` up to and including `;`, 0 for the rest."""
    begins = (batch.tokens == ANSWER).cumsum(dim=1)
    ends = (batch.tokens == END).cumsum(dim=1)
    # Where a window begins inside an answer there is an end without a beginning.
    begun_before = (ends > begins).any(dim=1, keepdim=True).int()
    in_answer = begins + begun_before > ends
    return Batch(batch.tokens, batch.targets, in_answer.float())


def main(folder: Path = Path("runs/span-masked-qa"), steps: int = 300) -> TrainResult:
    """Prepare the text, train, and return how it went."""
    texts = write_questions(folder / "texts")
    prepare([texts], folder / "data", PrepareConfig(tokenizer="bytes"))
    data = TokenData.open(folder / "data")
    shape = ExpertConfig(
        vocab_size=data.manifest.vocab_size,
        bos_id=data.manifest.bos_id,
        seq_len=SEQ_LEN,
        d_model=32,
        n_layers=2,
        n_heads=2,
    )
    model = Transformer(shape)
    init_weights(model, seed=0)
    config = TrainConfig(
        steps=steps, global_batch_tokens=16 * SEQ_LEN, learning_rate=5e-3, eval_every=100
    )
    plan = TrainPlan("questions", steps, branch_schedule(config, steps, warm=False), 5e-3)
    reading = TrainingData(data.documents("train"), data.documents("valid"), SEQ_LEN)
    return train_expert(model, reading, config, plan, folder, batch_transform=weigh_answers)


if __name__ == "__main__":
    result = main(*map(Path, sys.argv[1:2]))
    print(f"{result.steps} steps; the losses are in metrics.jsonl, answers only")
