"""Documents to tokens and, of chats, the weight of each: 1 in answers, 0 elsewhere."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pyper.data.special_tokens import Span, Written
from pyper.data.tokenizer import TextTokenizer

Encoded = tuple[NDArray[np.uint32], NDArray[np.uint8] | None]
Spans = Sequence[Span]


def encode_documents(
    tokenizer: TextTokenizer, documents: Sequence[tuple[str, Spans | None, Spans]]
) -> list[Encoded]:
    """Tokens (T,) of texts, without `bos` at the start, and weights (T,) of those with answers.

    A document is its text, its answers (None: not a chat, and without special tokens) and what was
    typed that is no special token. Where the tokenizer allows it, answers are tokenized apart from
    what is before them, as they are when a model writes them: no token straddles the edge.
    Elsewhere a token that reaches into an answer belongs to it.
    """
    if not tokenizer.cuts_anywhere:
        encoded = [_by_offsets(tokenizer, *document) for document in documents]
    else:
        encoded = _by_pieces(tokenizer, documents)
    return [_without_bos(tokenizer, *each) for each in encoded]


def _by_pieces(
    tokenizer: TextTokenizer, documents: Sequence[tuple[str, Spans | None, Spans]]
) -> list[Encoded]:
    pieces = [_pieces(*document) for document in documents]
    encoded = iter(_encode_batch(tokenizer, [piece for parts in pieces for piece, _ in parts]))
    return [
        _join([(next(encoded), weight) for _, weight in parts], answers is not None)
        for parts, (_, answers, _) in zip(pieces, documents, strict=True)
    ]


def _pieces(text: str, answers: Spans | None, typed: Spans) -> list[tuple[Written, int]]:
    """The text cut at the edges of answers, with weights."""
    if answers is None:
        return [(Written(text, [(0, len(text))]), 1)]
    written, pieces, at = Written(text, typed), [], 0
    for start, stop in answers:
        pieces += [(written.part(at, start), 0), (written.part(start, stop), 1)]
        at = stop
    return [*pieces, (written.part(at, len(text)), 0)]


def _encode_batch(
    tokenizer: TextTokenizer, pieces: Sequence[Written]
) -> Iterator[NDArray[np.uint32]]:
    """Pieces without special tokens at once, as all texts are encoded."""
    special = tokenizer.special
    found = [special.find(piece) for piece in pieces]
    plain = [piece.text for piece, names in zip(pieces, found, strict=True) if not names]
    encoded = iter(tokenizer.encode_batch(plain))
    for piece, names in zip(pieces, found, strict=True):
        yield special.encode(piece, names)[0] if names else next(encoded)


def _join(parts: list[tuple[NDArray[np.uint32], int]], is_weighed: bool) -> Encoded:
    tokens = np.concatenate([own for own, _ in parts]) if len(parts) > 1 else parts[0][0]
    if not is_weighed:
        return tokens, None
    return tokens, np.concatenate([np.full(len(own), weight, np.uint8) for own, weight in parts])


def _by_offsets(
    tokenizer: TextTokenizer, text: str, answers: Spans | None, typed: Spans
) -> Encoded:
    if answers is None:
        return tokenizer.encode_batch([text])[0], None
    written = Written(text, typed)
    if found := tokenizer.special.find(written):
        tokens, begins, ends = tokenizer.special.encode(written, found)
    else:
        tokens, begins, ends = tokenizer.encode_with_offsets(text)
    weights = np.zeros(len(tokens), np.uint8)
    for start, stop in answers:
        weights[(ends > start) & (begins < stop) & (ends > begins)] = 1
    return tokens, weights


def _without_bos(
    tokenizer: TextTokenizer, tokens: NDArray[np.uint32], weights: NDArray[np.uint8] | None
) -> Encoded:
    """Some templates begin with it, and every document does."""
    if weights is None or not len(tokens) or tokens[0] != tokenizer.bos_id:
        return tokens, weights
    return tokens[1:], weights[1:]
