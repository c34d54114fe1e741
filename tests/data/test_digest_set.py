"""The set by which duplicates are found: a set, in few bytes."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from pyper.data.digest_set import DigestSet

digests = st.integers(0, 400).map(lambda i: hashlib.sha256(bytes([i % 256, i // 256])).digest())
# All begin at the same slot, whatever the size of the table.
crowded = st.integers(1, 255).map(lambda i: bytes([i]) * 8 + bytes(24))


@given(st.lists(st.one_of(digests, crowded), max_size=300), st.integers(2, 64))
def test_it_is_a_set(items: list[bytes], slots: int) -> None:
    seen: set[bytes] = set()
    found = DigestSet(slots)
    for item in items:
        assert found.add(item) == (item not in seen)
        seen.add(item)
    assert len(found) == len(seen)


def test_a_document_takes_21_to_32_bytes() -> None:
    found = DigestSet()
    for i in range(50_000):
        assert found.add(hashlib.sha256(str(i).encode()).digest())
        if i > 1000:
            assert 21 <= found.n_bytes / len(found) <= 32.1
    assert not found.add(hashlib.sha256(b"7").digest())
