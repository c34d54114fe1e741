"""Sort documents: whose text is it, and how well does the mixture know such text?

    python examples/score_documents.py runs/two-folders mail/*.txt

Without files it sorts four lines.
"""

import sys
from pathlib import Path

import pyper

LINES = [
    "7: two plus three makes five",
    "9: the crow met a fox by the sea",
    "one times one, near the mill",
    "Zwölf Boxkämpfer jagen Viktor",
]

path = sys.argv[1] if len(sys.argv) > 1 else "runs/two-folders"
documents = {name: Path(name).read_text(encoding="utf-8") for name in sys.argv[2:]}
documents = documents or {line: line for line in LINES}

model = pyper.load(path)
alone = {name: model.expert(name) for name in model.experts}
for name, text in documents.items():
    score = model.score(text)
    weights = model.route(text)
    best = max(weights, key=weights.__getitem__)
    each = ", ".join(f"{e} {m.score(text).bits_per_byte:.2f}" for e, m in alone.items())
    print(f"{best:>12} {weights[best]:4.0%}  {score.bits_per_byte:.2f} bits/byte ({each})  {name}")
