"""The experts of a run as one sparse model, tuned for a moment.

    python examples/merge_experts.py runs/two-folders

The feed-forwards become experts inside the layers; the rest is averaged, since all branched from
one seed. Tuning makes up for the average.
"""

import sys

import pyper

path = sys.argv[1] if len(sys.argv) > 1 else "runs/two-folders"

merged = pyper.merge_run(path, "models/merged")
for name, loss in {**merged["before"], "merged": merged["loss"]}.items():
    print(f"{loss:.3f} nats per token: {name}")

tuning = {
    "run": {"folder": "runs/tuned"},
    "data": {"path": "data/two-folders", "seq_len": 32},
    "train": {
        "start_from": "models/merged",
        "steps": 40,
        "global_batch_tokens": 512,
        "learning_rate": 2e-3,
    },
}
tuned = pyper.load(pyper.train_run(tuning, progress=True))
report = pyper.evaluate_run("runs/tuned")
print(f"{report['experts'][0]:.3f} after tuning, on held-out text")
print(tuned.generate("1: two plus", max_new_tokens=12))
