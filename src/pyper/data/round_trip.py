"""Does a tokenizer give back the text that it was given?"""

from collections.abc import Iterable
from itertools import islice

from pyper.data.tokenizer import TextTokenizer

_TEXTS = 500
_CHARS = 2_000
_SHOWN = 30


def describe_changes(tokenizer: TextTokenizer, texts: Iterable[str]) -> str:
    """What encoding and decoding changes in a sample of texts, with an example; empty if nothing.

    Normalizing tokenizers lower-case, strip or compose; those without a byte alphabet lose what is
    not in their vocabulary.
    """
    sample = [text[:_CHARS] for text in islice(texts, _TEXTS)]
    encoded = tokenizer.encode_batch(sample)
    pairs = [(text, tokenizer.decode(ids)) for text, ids in zip(sample, encoded, strict=True)]
    changed = [(before, after) for before, after in pairs if before != after]
    if not changed:
        return ""
    before, after = changed[0]
    at = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after)
    )
    start = max(0, at - _SHOWN // 3)
    return (
        f"the tokenizer changes {len(changed) / len(sample):.0%} of the texts "
        f"({len(changed)} of a sample of {len(sample)}): {before[start : start + _SHOWN]!r} "
        f"becomes {after[start : start + _SHOWN]!r}"
    )
