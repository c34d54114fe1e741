"""What can be said of a text by counting: the names that filters may use for any document."""

from collections.abc import Callable

_LETTERS = bytes(range(65, 91)) + bytes(range(97, 123))


def words(text: str) -> int:
    """Stretches without spaces."""
    return len(text.split())


def lines(text: str) -> int:
    """Line ends, and the last line."""
    return text.count("\n") + 1


def alpha_share(text: str) -> float:
    """Letters (of any alphabet) among the characters."""
    if text.isascii():
        encoded = text.encode()
        letters = len(encoded) - len(encoded.translate(None, _LETTERS))
    else:
        letters = sum(map(str.isalpha, text))
    return letters / max(1, len(text))


def digit_share(text: str) -> float:
    """Digits among the characters."""
    return sum(map(text.count, "0123456789")) / max(1, len(text))


def space_share(text: str) -> float:
    """Spaces, tabs and line ends among the characters."""
    return (len(text) - sum(map(len, text.split()))) / max(1, len(text))


def upper_share(text: str) -> float:
    """Capital letters among the characters."""
    return sum(map(str.isupper, text)) / max(1, len(text))


def mean_word_chars(text: str) -> float:
    """Characters per word."""
    found = text.split()
    return sum(map(len, found)) / max(1, len(found))


def longest_line(text: str) -> int:
    """Characters of the longest line."""
    return max(map(len, text.split("\n")))


def repeated_line_share(text: str) -> float:
    """Lines that are there already, among those that are not empty."""
    found = [line for line in text.split("\n") if line.strip()]
    return 1 - len(set(found)) / max(1, len(found))


MEASURES: dict[str, Callable[[str], int | float | str]] = {
    "chars": len,
    "words": words,
    "lines": lines,
    "alpha_share": alpha_share,
    "digit_share": digit_share,
    "space_share": space_share,
    "upper_share": upper_share,
    "mean_word_chars": mean_word_chars,
    "longest_line": longest_line,
    "repeated_line_share": repeated_line_share,
    "text": str,
}
