"""Documents to tokens and, of chats, the weight of each: 1 in answers, 0 elsewhere."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyper.data.chats import Span
from pyper.data.tokenizer import TextTokenizer

Encoded = tuple[NDArray[np.uint32], NDArray[np.uint8] | None]


def encode_documents(
    tokenizer: TextTokenizer, documents: Sequence[tuple[str, Sequence[Span] | None]]
) -> list[Encoded]:
    """Tokens (T,) of each text, and weights (T,) of those with answers (character spans).

    Where the tokenizer allows it, answers are tokenized apart from what is before them, as they are
    when a model writes them: no token straddles the edge. Elsewhere a token that reaches into an
    answer belongs to it.
    """
    if not tokenizer.cuts_anywhere:
        return [_by_offsets(tokenizer, text, answers) for text, answers in documents]
    pieces = [_pieces(text, answers) for text, answers in documents]
    encoded = iter(tokenizer.encode_batch([text for parts in pieces for text, _ in parts]))
    return [
        _join([(next(encoded), weight) for _, weight in parts], answers is not None)
        for parts, (_, answers) in zip(pieces, documents, strict=True)
    ]


def _pieces(text: str, answers: Sequence[Span] | None) -> list[tuple[str, int]]:
    """The text cut at the edges of answers, with weights."""
    if answers is None:
        return [(text, 1)]
    pieces, at = [], 0
    for start, stop in answers:
        pieces += [(text[at:start], 0), (text[start:stop], 1)]
        at = stop
    return [*pieces, (text[at:], 0)]


def _join(parts: list[tuple[NDArray[np.uint32], int]], is_weighed: bool) -> Encoded:
    tokens = np.concatenate([own for own, _ in parts]) if len(parts) > 1 else parts[0][0]
    if not is_weighed:
        return tokens, None
    return tokens, np.concatenate([np.full(len(own), weight, np.uint8) for own, weight in parts])


def _by_offsets(tokenizer: TextTokenizer, text: str, answers: Sequence[Span] | None) -> Encoded:
    if answers is None:
        return tokenizer.encode_batch([text])[0], None
    tokens, begins, ends = tokenizer.encode_with_offsets(text)
    weights = np.zeros(len(tokens), np.uint8)
    for start, stop in answers:
        weights[(ends > start) & (begins < stop) & (ends > begins)] = 1
    return tokens, weights
