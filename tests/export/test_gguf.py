"""GGUF files: every tensor in its place, the tokenizer, and what llama.cpp has no twin of."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from export.small_gguf import SWIGLU, TEXT, TWINS, trained_bpe
from nn.small_experts import small_expert
from pyper.config import RopeScaling, SparseConfig
from pyper.data import TextTokenizer
from pyper.errors import CheckpointError, ConfigError, MissingExtraError, TokenizerError
from pyper.export.gguf_file import check_gguf, write_gguf
from pyper.export.gguf_model import gguf_architecture
from pyper.export.gguf_tokenizer import gguf_tokenizer
from pyper.nn import Transformer

BYTES = TextTokenizer.bytes_only()


def twin(name: str, tokenizer: TextTokenizer = BYTES, **changes: Any) -> Transformer:
    return small_expert(vocab_size=tokenizer.vocab_size, **TWINS[name][1] | changes)


def read(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def value_of(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def write(model: Transformer, path: Path, file_type: Any = "f32", **options: Any) -> str | None:
    return write_gguf(model, BYTES, path, name="small", file_type=file_type, **options)


@pytest.mark.parametrize("name", TWINS)
def test_the_file_names_the_architecture_and_holds_the_weights(name: str, tmp_path: Path) -> None:
    model, path = twin(name), tmp_path / "small.gguf"
    assert write(model, path) is None
    architecture = TWINS[name][0]
    assert value_of(path, "general.architecture") == architecture
    assert value_of(path, f"{architecture}.context_length") == 48
    assert value_of(path, f"{architecture}.attention.head_count_kv") == model.config.kv_heads
    assert value_of(path, f"{architecture}.attention.key_length") == model.config.dim_per_head
    tensors = read(path)
    assert check_gguf(path, model, "f32") == len(tensors)
    np.testing.assert_array_equal(tensors["token_embd.weight"], model.embedding.weight.detach())
    assert ("output.weight" in tensors) is not model.config.tie_embeddings
    n_own = sum(1 for _ in model.parameters())
    assert len(tensors) >= n_own  # stacked ones come apart


def test_queries_and_keys_are_turned_in_pairs_by_llama(tmp_path: Path) -> None:
    model, path = twin("plain"), tmp_path / "small.gguf"
    write(model, path)
    own = model.blocks[1].attention.qkv.weight.detach()
    H, kv, K = 4, 2, 4
    for name, rows, heads in (("attn_q", own[: H * K], H), ("attn_k", own[H * K :], kv)):
        got = read(path)[f"blk.1.{name}.weight"]
        for head in range(heads):
            for i in range(K // 2):  # pair i of theirs is (i, i + K/2) of ours
                np.testing.assert_array_equal(got[head * K + 2 * i], rows[head * K + i])
                np.testing.assert_array_equal(
                    got[head * K + 2 * i + 1], rows[head * K + i + K // 2]
                )
    np.testing.assert_array_equal(read(path)["blk.1.attn_v.weight"], own[-kv * K :])


def test_gate_comes_before_value(tmp_path: Path) -> None:
    model, path = twin("qk-norm"), tmp_path / "small.gguf"
    write(model, path)
    gate, value = model.blocks[0].feed_forward.up.weight.detach().chunk(2)
    np.testing.assert_array_equal(read(path)["blk.0.ffn_gate.weight"], gate)
    np.testing.assert_array_equal(read(path)["blk.0.ffn_up.weight"], value)
    half_split = model.blocks[0].attention.qkv.weight.detach()[:16]  # qwen3 turns as we do
    np.testing.assert_array_equal(read(path)["blk.0.attn_q.weight"], half_split)


@pytest.mark.parametrize("file_type", ["f16", "bf16"])
def test_matrices_are_narrow_and_vectors_wide(file_type: str, tmp_path: Path) -> None:
    model, path = twin("plain"), tmp_path / "small.gguf"
    write(model, path, file_type)
    check_gguf(path, model, file_type)  # type: ignore[arg-type]
    dtype = torch.float16 if file_type == "f16" else torch.bfloat16
    rounded = model.head.weight.detach().to(dtype)
    np.testing.assert_array_equal(
        read(path)["output.weight"].view(np.uint16), rounded.view(torch.uint16)
    )
    assert read(path)["output_norm.weight"].dtype == np.float32


def test_a_changed_weight_is_found(tmp_path: Path) -> None:
    model, path = twin("plain"), tmp_path / "small.gguf"
    write(model, path)
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[3, 5] += 1e-3
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight"):
        check_gguf(path, model, "f32")


def test_numbers_that_half_precision_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = twin("plain")
    with torch.no_grad():
        model.head.weight[0, 0] = 1e5
    with pytest.raises(ConfigError, match=r"output\.weight.*f16"):
        write(model, tmp_path / "small.gguf", "f16")
    write(model, tmp_path / "small.gguf", "bf16")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({}, "GELU"),
        ({"activation": "gelu_tanh"}, "GELU"),
        ({"activation": "relu2", "qk_norm": True}, "qk_norm"),
        ({"activation": "relu2", "attention_bias": True}, "biases"),
        (SWIGLU | {"qk_norm": True, "feed_forward_bias": True}, "biases"),
        (SWIGLU | {"no_rope_layers": (1,)}, "no_rope_layers"),
        (SWIGLU | {"norm_position": "post", "qk_norm": True}, "qk_norm_over"),
        (SWIGLU | {"qk_norm": True, "qk_norm_over": "projection"}, "norm_position"),
        (SWIGLU | {"rope_scaling": RopeScaling(kind="yarn", factor=2.0)}, "yarn"),
        (
            SWIGLU | {"qk_norm": True, "rope_scaling": RopeScaling(kind="llama3", factor=2.0)},
            "llama3",
        ),
        ({"kind": "sparse", "sparse": SparseConfig(n_experts=2)}, "sparse"),
    ],
    ids=str,
)
def test_experts_without_a_twin_are_refused_with_the_reason(
    shape: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        gguf_architecture(small_expert(**shape).config)


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    tokenizer, path = trained_bpe(), tmp_path / "small.gguf"
    model = small_expert(vocab_size=tokenizer.vocab_size + 3, **SWIGLU)  # a padded table
    note = write_gguf(
        model, tokenizer, path, name="small", file_type="f32", chat_template="{{ messages }}"
    )
    assert note is not None
    assert "apostrophe" in note
    assert value_of(path, "tokenizer.ggml.model") == "gpt2"
    assert value_of(path, "tokenizer.ggml.bos_token_id") == tokenizer.bos_id
    assert value_of(path, "tokenizer.ggml.eos_token_id") == tokenizer.bos_id
    assert value_of(path, "tokenizer.chat_template") == "{{ messages }}"
    tokens = value_of(path, "tokenizer.ggml.tokens")
    types = value_of(path, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == model.config.vocab_size
    assert types[tokenizer.bos_id] == gguf.TokenType.CONTROL
    assert types[-3:] == [gguf.TokenType.UNUSED] * 3
    assert len(set(tokens)) == len(tokens)


def test_the_written_vocabulary_and_merges_give_our_tokens() -> None:
    tokenizer = trained_bpe()
    assert as_llama_cpp_reads(tokenizer).encode(TEXT).ids == tokenizer.encode(TEXT)


def test_the_note_is_right_about_capitals_after_an_apostrophe() -> None:
    tokenizer = TextTokenizer.train_bpe(iter(["'Sir 'Sir 'Sir"] * 50), 262)
    other = as_llama_cpp_reads(tokenizer)
    assert len(tokenizer.encode("'Sir")) == 1
    assert other.encode("'Sir").ids != tokenizer.encode("'Sir")
    assert other.encode("it's").ids == tokenizer.encode("it's")


def as_llama_cpp_reads(tokenizer: TextTokenizer) -> Tokenizer:
    """What the file says, with the pattern that llama.cpp knows as `smaug-bpe`."""
    words = gguf_tokenizer(tokenizer, tokenizer.vocab_size)
    assert words.pre == "smaug-bpe"
    vocab = {token: index for index, token in enumerate(words.tokens)}
    merges = [tuple(merge.split(" ")) for merge in words.merges]
    other = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    pattern = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return other


def test_bytes_need_no_note_and_no_pattern() -> None:
    words = gguf_tokenizer(BYTES, BYTES.vocab_size)
    assert words.note is None
    assert words.merges == ["<|bos|> <|bos|>"]  # one that no text can need


def test_other_tokenizers_are_refused_with_the_reason() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    strange = trained_bpe()._tokenizer
    strange.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), byte_level])
    with pytest.raises(TokenizerError, match="Punctuation"):
        gguf_tokenizer(TextTokenizer(strange), 300)
    normalizing = trained_bpe()._tokenizer
    normalizing.normalizer = normalizers.Lowercase()
    with pytest.raises(TokenizerError, match="normalizer"):
        gguf_tokenizer(TextTokenizer(normalizing), 300)
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(TokenizerError, match="WordLevel"):
        gguf_tokenizer(TextTokenizer(words), 3)


def test_gpt2s_own_cut_has_a_name() -> None:
    like_gpt2 = trained_bpe()._tokenizer
    like_gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = gguf_tokenizer(TextTokenizer(like_gpt2), 300)
    assert (words.pre, words.note) == ("gpt-2", None)


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingExtraError) as error:
        write(twin("plain"), tmp_path / "small.gguf")
    assert "pyper[export]" in error.value.hint
