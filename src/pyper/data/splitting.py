"""Train, valid or test? Decided by a document's own hash, or by cutting long documents.

The hash makes a document's split independent of all others: adding text never moves a test
document into training. A domain with so few documents that the hash gives no fair shares (one long
`input.txt`, say) has each of its documents cut instead: its end is held out.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pyper.config import PrepareConfig
from pyper.data.readers import Document
from pyper.data.sources import SPLITS, Split

_MIN_CUT_CHARS = 40
_UNFAIR = 4.0
"""A share this many times too large or too small makes the documents be cut."""


@dataclass(frozen=True, slots=True)
class Digest:
    """SHA-256 of a text, read as what it is used for."""

    raw: bytes

    @property
    def share(self) -> float:
        """Uniform in [0, 1): decides the split."""
        return int.from_bytes(self.raw[:8], "big") / 2.0**64

    @property
    def priority(self) -> int:
        """Uniform below 2**64, independent of `share`: decides what is sampled."""
        return int.from_bytes(self.raw[8:16], "big")


def digest_of(text: str) -> Digest:
    """The SHA-256 of a text."""
    return Digest(hashlib.sha256(text.encode()).digest())


@dataclass(slots=True)
class DomainPlan:
    """How one domain is split; `observe` all of its documents, then call `assign`.

    held_out: the fraction for each split that no file of the domain was named after.
    """

    held_out: dict[Split, float]
    documents: int = 0
    _bytes: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))

    def observe(self, document: Document, digest: Digest) -> None:
        """Count a document.

        Held-out documents come first: one that a file was named after ends the choosing for it.
        """
        self.documents += 1
        if document.split in ("valid", "test"):
            self.held_out.pop(document.split, None)
        elif document.answers is None:
            self._bytes[self.by_hash(digest)] += len(document.text)

    @property
    def cuts(self) -> bool:
        """Whether the documents of this domain are cut."""
        total = sum(self._bytes.values())
        fair = (
            fraction / _UNFAIR <= self._bytes[split] / total <= fraction * _UNFAIR
            for split, fraction in self.held_out.items()
        )
        return total > 0 and not all(fair)

    def by_hash(self, digest: Digest) -> Split:
        """The split of a whole document."""
        share = digest.share
        for split, fraction in self.held_out.items():
            if share < fraction:
                return split
            share -= fraction
        return "train"

    def assign(self, document: Document, digest: Digest) -> Iterator[tuple[Split, str]]:
        """The document's texts with their splits: one, or up to three where documents are cut."""
        if document.split in ("valid", "test"):
            yield document.split, document.text
        elif self.cuts and document.answers is None:  # half a chat is none
            yield from cut_document(document.text, self.held_out)
        else:
            yield self.by_hash(digest), document.text


def plan_domain(given: set[Split | None], config: PrepareConfig) -> DomainPlan:
    """The plan of a domain whose files are named after the splits in `given`."""
    fractions: dict[Split, float] = {"valid": config.valid_fraction, "test": config.test_fraction}
    return DomainPlan({s: f for s, f in fractions.items() if f > 0 and s not in given})


def cut_document(text: str, held_out: Mapping[Split, float]) -> Iterator[tuple[Split, str]]:
    """Cut a text, at line ends if there are any: train first, the held-out parts at its end."""
    if len(text) < _MIN_CUT_CHARS or not held_out:
        yield "train", text
        return
    parts: list[tuple[Split, float]] = [("train", 1.0 - sum(held_out.values())), *held_out.items()]
    start, edge = 0, 0.0
    for split, fraction in parts:
        edge += fraction
        ideal = round(edge * len(text))
        stop = len(text) if split == parts[-1][0] else _near(text, ideal, min(held_out.values()))
        if text[start:stop].strip():
            yield split, text[start:stop]
        start = stop


def _near(text: str, ideal: int, fraction: float) -> int:
    """The line end, else the space, closest before or after `ideal`, within half a part."""
    slack = max(1, int(len(text) * fraction / 2))
    for mark in "\n", " ":
        before = text.rfind(mark, ideal - slack, ideal)
        after = text.find(mark, ideal, ideal + slack)
        found = before if before >= 0 else after
        if found >= 0:
            return found + 1
    return ideal
