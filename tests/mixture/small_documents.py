"""Token documents in memory."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyper.data import Documents


def documents_of(
    texts: Sequence[NDArray[np.int64]],
    domain: Sequence[int],
    *,
    domains: Sequence[str] = ("a", "b", "c", "d"),
    bytes_per_token: float = 3.0,
) -> Documents:
    """Texts without their document token, which is 0, and the domain of each."""
    whole = [np.concatenate([[0], text]).astype(np.uint16) for text in texts]
    lengths = np.array([len(text) for text in whole], dtype=np.int64)
    return Documents(
        [np.concatenate(whole)] if whole else [],
        shard_index=np.zeros(len(whole), dtype=np.int32),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        n_bytes=np.round(lengths * bytes_per_token).astype(np.int64),
        domain_index=np.array(domain, dtype=np.int16),
        domains=domains,
        fingerprint="in memory",
        bos_id=0,
    )


def draw_documents(
    seed: int, n_per_domain: int = 40, *, n_domains: int = 4, vocab_size: int = 40
) -> Documents:
    """Documents of `n_domains` token distributions, the same ones for every seed, interleaved."""
    frequencies = np.random.default_rng(0).dirichlet(np.full(vocab_size - 1, 0.3), n_domains)
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 120, n_per_domain)
    drawn = [
        (domain, rng.choice(np.arange(1, vocab_size), length, p=frequencies[domain]))
        for length in lengths
        for domain in range(n_domains)
    ]
    return documents_of([text for _, text in drawn], [domain for domain, _ in drawn])
