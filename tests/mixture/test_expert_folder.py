"""Loading an expert takes room for its weights once."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nn.small_experts import small_expert
from pyper.mixture.expert_folder import build_expert, model_tensors


class _Room(TorchDispatchMode):
    """Bytes that are asked for on the CPU, used or not: on a GPU they would be taken."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "empty" in str(func) and out.device.type == "cpu":
            self.n_bytes += out.nbytes
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_an_expert_has_room_for_each_matrix_once(tied: bool) -> None:
    model = small_expert(0, tie_embeddings=tied).eval()
    tensors = model_tensors(model)
    with _Room() as room:
        built = build_expert(model.config, tensors, device=torch.device("cpu"))
    assert room.n_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (built.head.weight is built.embedding.weight) == tied
    tokens = torch.randint(model.config.vocab_size, (2, 9))
    assert torch.equal(built(tokens), model(tokens))
