"""Which texts were seen already, in a few bytes each."""

_SLOT = 16
_EMPTY = bytes(_SLOT)
_FULL = 0.75
_GROWTH = 1.5


class DigestSet:
    """A set of SHA-256 digests, of which the first 128 bits are kept: 21 to 32 bytes for each.

    Python's own set takes about 120. Two different texts would have to agree in 128 bits to be
    taken for one: for a thousand million documents the chance is about 1 in 10^21. Open addressing,
    linear probing; while it grows, the old table stands beside the new one.
    """

    def __init__(self, slots: int = 1024) -> None:
        self._slots, self._used = slots, 0
        self._table = bytearray(_SLOT * slots)

    def __len__(self) -> int:
        return self._used

    @property
    def n_bytes(self) -> int:
        """Memory of the table."""
        return len(self._table)

    def add(self, digest: bytes) -> bool:
        """Put in a digest of at least 16 bytes; False when it was there."""
        key = digest[:_SLOT]
        at = self._find(key)
        if self._table[at : at + _SLOT] == key:
            return False
        self._table[at : at + _SLOT] = key
        self._used += 1
        if self._used > _FULL * self._slots:
            self._grow()
        return True

    def _find(self, key: bytes) -> int:
        """Where a key is, or the empty slot where it belongs."""
        table, end = self._table, len(self._table)
        # The last 8 bytes: the first decide the split, and one domain may be held out whole.
        at = int.from_bytes(key[8:], "big") % self._slots * _SLOT
        while (found := table[at : at + _SLOT]) != key and found != _EMPTY:
            at += _SLOT
            if at == end:
                at = 0
        return at

    def _grow(self) -> None:
        old = self._table
        self._slots = int(self._slots * _GROWTH)
        self._table = bytearray(_SLOT * self._slots)
        for start in range(0, len(old), _SLOT):
            key = bytes(old[start : start + _SLOT])
            if key != _EMPTY:
                at = self._find(key)
                self._table[at : at + _SLOT] = key
