"""Bytes and texts mended: what was mended is counted."""

from pyper.data.counts import ReadCounts


def decode(data: bytes, counts: ReadCounts) -> str:
    """UTF-8, or UTF-16 with its mark; what is neither becomes U+FFFD."""
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # what some Windows programs call Unicode
            return data.decode("utf-16")
        return data.decode("utf-8")
    except UnicodeDecodeError:
        counts.bad_utf8 += 1
        return data.decode("utf-8", "replace")


def clean(text: str, counts: ReadCounts) -> str:
    """Without a byte order mark, NULs and halves of characters; line ends as Unix has them."""
    text = without_mark(text, counts)
    if "\0" in text:
        counts.nul_bytes += 1
        text = text.replace("\0", "")
    return _without_surrogates(text.replace("\r\n", "\n"), counts)


def without_mark(text: str, counts: ReadCounts) -> str:
    """Without a byte order mark at its start."""
    if not text.startswith("\ufeff"):
        return text
    counts.byte_order_marks += 1
    return text.lstrip("\ufeff")


def _without_surrogates(text: str, counts: ReadCounts) -> str:
    """JSON may escape half a character (`\\ud83d`), which no UTF-8 can hold."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        counts.bad_utf8 += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
