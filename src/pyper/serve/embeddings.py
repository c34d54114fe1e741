"""Texts as vectors: the mean of an expert's final states."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyper.errors import PromptError
from pyper.mixture import Mixture


@torch.no_grad()
def embed(mixture: Mixture, tokens: Sequence[int], expert: int | None) -> list[float]:
    """The mean over positions of the final states: (D,), not normalised.

    Without a pinned expert, the mean over all experts as well: had each text its own expert, two
    vectors could not be compared. Raises PromptError where experts differ in width.
    """
    experts = range(mixture.n_experts) if expert is None else [expert]
    means = []
    for index in experts:
        model = mixture.expert(index)
        states = model.hidden(torch.tensor([tokens], device=model.device))  # (1, T, D)
        means.append(states[0].float().mean(dim=0).cpu())
    if len({len(mean) for mean in means}) > 1:
        raise PromptError(
            "the experts are not equally wide, so there is no mean over them",
            hint="ask one of them: `NAME/expert-0`",
        )
    vector: list[float] = torch.stack(means).mean(dim=0).tolist()
    return vector


def embedding_object(index: int, vector: list[float], encoding: str) -> dict[str, Any]:
    """One entry of the answer; `base64` is of little-endian float32."""
    value: Any = vector
    if encoding == "base64":
        value = base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": value}
