"""Long texts in pieces that give the tokens of the whole."""

import re

PIECE_CHARS = 16_384
"""Longer texts are encoded in pieces: both cores work, and one endless line stays linear."""


def split_text(text: str, chars: int = PIECE_CHARS) -> list[str]:
    """Cut a long text into pieces of at most `chars`, where no token crosses if possible.

    Between a line end and a visible character the pre-tokenizer cuts anyway, so pieces give the
    tokens of the whole; a text with no such place is cut at a space, or anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > chars:
        stop = _cut(text, start, start + chars)
        pieces.append(text[start:stop])
        start = stop
    pieces.append(text[start:])
    return pieces


def _cut(text: str, start: int, stop: int) -> int:
    # Only the last eighth is searched: pieces stay long, and the search linear.
    for pattern in (r"(?s:.*)\n(?=\S)", r"(?s:.*)\S(?= )"):
        found = re.compile(pattern).match(text, stop - (stop - start) // 8, stop)
        if found:
            return found.end()
    return stop
