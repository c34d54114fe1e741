"""llama.cpp itself reads the GGUF files: the same tokens, logits and greedy text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.small_gguf import TEXT, TWINS, trained_bpe
from nn.small_experts import small_expert
from pyper.data import TextTokenizer
from pyper.export.gguf_file import write_gguf
from pyper.nn import Transformer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.slow

F32 = 0  # of ggml: keys and values are in half precision otherwise
TOKENIZERS: dict[str, Callable[[], TextTokenizer]] = {
    "bpe": trained_bpe,
    "bytes": TextTokenizer.bytes_only,
}


def greedy(model: Transformer, tokens: list[int], n: int) -> list[int]:
    for _ in range(n):
        tokens = [*tokens, int(model(torch.tensor([tokens]))[0, -1].argmax())]
    return tokens


def greedy_there(llama: Any, tokens: list[int], n: int) -> list[int]:
    llama.reset()
    llama.eval(tokens)
    for _ in range(n):
        token = int(np.argmax(llama.scores[len(tokens) - 1]))
        tokens = [*tokens, token]
        llama.eval([token])
    return tokens


@pytest.mark.parametrize("cut", TOKENIZERS)
@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_llama_cpp_agrees(name: str, cut: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[cut]()
    shape = {"vocab_size": tokenizer.vocab_size, "seq_len": 128, "d_model": 32} | TWINS[name][1]
    model, path = small_expert(**shape), tmp_path / "small.gguf"
    write_gguf(model, tokenizer, path, name="small", file_type="f32")
    llama = llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=F32, type_v=F32
    )
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert llama.tokenize(TEXT.encode(), add_bos=True, special=False) == tokens
    llama.eval(tokens)
    got, expected = llama.scores[: len(tokens)], model(torch.tensor([tokens]))[0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert greedy_there(llama, tokens, 16) == greedy(model, tokens, 16)
