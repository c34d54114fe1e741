"""Text to token numbers and back, around the `tokenizers` library.

Every document starts with one special token, `bos`, which also ends the document before it. Other
special tokens are only those that a chat template writes (`special_tokens.py`). In a user's text
they are text: somebody who writes `<|bos|>` in a document must not be able to start a new one.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pyper.data.bos_token import BOS, add_special, find_or_add_bos
from pyper.data.special_tokens import SpecialTokens
from pyper.data.text_pieces import split_text
from pyper.data.tokenizer_json import encoding_errors, library_errors, parse_tokenizer
from pyper.errors import StorageError, TokenizerError

# Words, numbers of at most three digits, punctuation, line ends, spaces. Without the limit on
# digits the vocabulary fills up with the years and the prices of the training text.
_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
_PIECES_AT_ONCE = 1024
"""The library's results take some fifty bytes per byte of text until they are arrays."""


class TextTokenizer:
    """A `tokenizers.Tokenizer` with a `bos` token; ids are below `vocab_size`.

    Raises TokenizerError where the tokenizer has no vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.bos_id = find_or_add_bos(tokenizer)
        # Not kept in tokenizer.json, so it is set at every load.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size = _highest_id(tokenizer) + 1

    @cached_property
    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return settings

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical `tokenizer.json`: equal when the tokenizers are equal."""
        canonical = json.dumps(self._settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def _encoder(self) -> Tokenizer:
        # Other models than BPE may have special tokens among their words.
        is_bpe = self._settings["model"]["type"] == "BPE"
        return self._tokenizer if is_bpe else self.special.nameless_tokenizer()

    @cached_property
    def special(self) -> SpecialTokens:
        """For what a chat template writes; any other text has none."""
        return SpecialTokens(self._settings, self.bos_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `bos`."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, without `bos`; texts are encoded in parallel."""
        if self._byte_ids is not None:
            return [self._encode_bytes(text, self._byte_ids) for text in texts]
        pieces = [self._pieces(text) for text in texts]
        encoded = self._encode_pieces([piece for parts in pieces for piece in parts])
        return [np.concatenate([next(encoded) for _ in parts]) for parts in pieces]

    @cached_property
    def cuts_anywhere(self) -> bool:
        """Whether the tokens of the parts of a text are tokens of the text."""
        # Others (sentencepiece) may mark the start of a text, and every piece would get the mark.
        normalizer = self._settings["normalizer"]
        return self._is_byte_level and (normalizer is None or normalizer["type"] == "NFC")

    def encode_with_offsets(
        self, text: str
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.int64]]:
        """Token ids (T,) of a text, without `bos`, and the characters where each starts, stops."""
        with encoding_errors():
            found = self._encoder.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(found.ids, dtype=np.uint32), offsets[:, 0], offsets[:, 1]

    def _encode_pieces(self, pieces: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        for start in range(0, len(pieces), _PIECES_AT_ONCE):
            batch = pieces[start : start + _PIECES_AT_ONCE]
            with encoding_errors():
                encoded = self._encoder.encode_batch_fast(batch, add_special_tokens=False)
            for found in encoded:
                yield np.array(found.ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """The text of `ids`, `bos` left out; bytes that are no UTF-8 become U+FFFD.

        Raises TokenizerError for an id outside the vocabulary.
        """
        if self._bytes_of_id is None:
            kept = [int(i) for i in ids if int(i) != self.bos_id]
            text: str = self._tokenizer.decode(kept, skip_special_tokens=False)
            return text
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> bytes:
        """The UTF-8 bytes of `ids`, `bos` left out; may end in the middle of a character.

        For streaming: feed the bytes to an incremental UTF-8 decoder. Tokenizers that are not
        byte-level say what each id adds to a text. Raises TokenizerError for an id outside the
        vocabulary.
        """
        table = self._bytes_of_id
        if table is None:
            return b"".join(self._bytes_inside(int(i)) for i in ids)
        try:
            return b"".join([table[i] for i in ids])
        except IndexError:
            raise TokenizerError(
                f"a token id is outside the vocabulary of {self.vocab_size}",
                hint="the model and the tokenizer belong to different data; use the pair that "
                "was trained together",
            ) from None

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`. Raises StorageError when it cannot be written."""
        try:
            path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read any `tokenizer.json`. Raises TokenizerError when it is not one."""
        hint = "save it with `Tokenizer.save` or `save_pretrained` of a fast tokenizer"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"cannot read the tokenizer {path}: {error.strerror}",
                hint="give `bpe`, `bytes`, or the path of a `tokenizer.json`",
            ) from error
        with library_errors(f"{path} is not a tokenizer.json", hint):
            return cls(parse_tokenizer(content.decode(), str(path), hint))

    @classmethod
    def train_bpe(cls, texts: Iterator[str], vocab_size: int) -> "TextTokenizer":
        """Learn a byte-level BPE; little text gives fewer than `vocab_size` entries.

        Raises TokenizerError when `vocab_size` does not hold 256 bytes and `bos`.
        """
        if vocab_size < 257:
            raise TokenizerError(
                f"`vocab_size` must be at least 257 (256 bytes and {BOS}), not {vocab_size}"
            )
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[BOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        pieces = (piece for text in texts for piece in split_text(text))
        tokenizer.train_from_iterator(pieces, trainer=trainer)
        return cls(tokenizer)

    @classmethod
    def bytes_only(cls) -> "TextTokenizer":
        """256 bytes and `bos`: nothing to train, nothing unknown, vocabulary of 257."""
        vocab = {BOS: 0}
        vocab |= {char: byte + 1 for byte, char in enumerate(_byte_characters())}
        return cls(_byte_level(models.BPE(vocab=vocab, merges=[])))

    @cached_property
    def _is_byte_level(self) -> bool:
        return (self._settings["decoder"] or {}).get("type") == "ByteLevel"

    @cached_property
    def _bytes_of_id(self) -> list[bytes] | None:
        if not self._is_byte_level:
            return None
        added = {token["id"] for token in self._settings["added_tokens"]}
        byte_of_char = {char: byte for byte, char in enumerate(_byte_characters())}
        table = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            spelled = index not in added and all(char in byte_of_char for char in token)
            table[index] = bytes(byte_of_char[c] for c in token) if spelled else token.encode()
        table[self.bos_id] = b""
        return table

    def _bytes_inside(self, index: int) -> bytes:
        """What a token is inside a text. Alone, it may lose its space, or half a character."""
        if index in self._fallback_bytes:
            return self._fallback_bytes[index]
        before = self.decode(self._some_word)
        text = self.decode([*self._some_word, index])
        inside = text[len(before) :] if text.startswith(before) else self.decode([index])
        return inside.encode()

    @cached_property
    def _some_word(self) -> list[int]:
        return self.encode("a")

    @cached_property
    def _fallback_bytes(self) -> dict[int, bytes]:
        """The tokens `<0x00>` … `<0xFF>` of tokenizers that spell rare characters by them."""
        if not self._settings["model"].get("byte_fallback"):
            return {}
        ids = {byte: self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        return {index: bytes([byte]) for byte, index in ids.items() if index is not None}

    @cached_property
    def _byte_ids(self) -> NDArray[np.uint32] | None:
        """Id of each byte where nothing is ever merged: encoding is then one array look-up."""
        model = self._settings["model"]
        plain = self._is_byte_level and self._settings["normalizer"] is None
        if not plain or model["type"] != "BPE" or model["merges"]:
            return None
        ids = [self._tokenizer.token_to_id(char) for char in _byte_characters()]
        return None if None in ids else np.array(ids, dtype=np.uint32)

    def _encode_bytes(self, text: str, table: NDArray[np.uint32]) -> NDArray[np.uint32]:
        ids: NDArray[np.uint32] = table[np.frombuffer(text.encode(), dtype=np.uint8)]
        return ids

    def _pieces(self, text: str) -> list[str]:
        return split_text(text) if self.cuts_anywhere else [text]


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add_special(tokenizer, BOS)
    return tokenizer


def _highest_id(tokenizer: Tokenizer) -> int:
    # Not get_vocab_size: a vocabulary may have holes, and an embedding needs the highest id.
    return max(tokenizer.get_vocab(with_added_tokens=True).values())


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
