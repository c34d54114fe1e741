"""Write from a mixture, and see which expert wrote each piece.

python examples/who_wrote_it.py runs/two-folders "1: two plus"
"""

import sys
from collections import Counter
from itertools import groupby

import pyper

path = sys.argv[1] if len(sys.argv) > 1 else "runs/two-folders"
prompt = sys.argv[2] if len(sys.argv) > 2 else ""

model = pyper.load(path)
pieces = list(model.stream(prompt, max_new_tokens=40, seed=1))

print(f"{'':>12} {prompt!r}")
for expert, own in groupby(pieces, key=lambda piece: piece.expert):
    print(f"{model.experts[expert]:>12} {''.join(piece.text for piece in own)!r}")

wrote = Counter(model.experts[piece.expert] for piece in pieces)
print(", ".join(f"{name} {n / len(pieces):.0%}" for name, n in wrote.most_common()))
