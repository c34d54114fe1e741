from pathlib import Path

import numpy as np
import torch

from pyper.checkpoint import read_tensors, write_tensors


def test_a_tensor_without_elements_survives(tmp_path: Path) -> None:
    empty = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64)] * 2))
    strided = torch.zeros(1, dtype=torch.int64).expand(4)[:0]
    write_tensors(tmp_path / "t", {"empty": empty, "strided": strided, "full": torch.ones(3)})

    read = read_tensors(tmp_path / "t")

    assert read["empty"].shape == (0,)
    assert read["strided"].dtype == torch.int64
    assert torch.equal(read["full"], torch.ones(3))
