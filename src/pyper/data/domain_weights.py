"""How often each domain is seen in an epoch: twice, half of it, not at all."""

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pyper.data.packing import fixed_permutation
from pyper.data.shards import Documents
from pyper.errors import DataError


def epoch_documents(
    documents: Documents, weights: Mapping[str, float], random_seed: int, epoch: int
) -> NDArray[np.int64]:
    """The documents of one epoch of the weighted mixture, as indices into `documents`.

    A weight of 2.0 is every document of the domain twice, 0.5 a half of them, another one in the
    next epoch; domains that are not named have 1.0. The documents of a domain stand in a circle,
    shuffled once, and each epoch goes on round it from where the last one stopped: after e epochs
    every document was seen floor(e·w) or ceil(e·w) times.
    """
    parts = []
    for number, domain in enumerate(documents.domains):
        members = np.flatnonzero(documents.domain_index == number)
        weight = weights.get(domain, 1.0)
        if weight == 1.0:
            parts.append(members)
            continue
        order = members[fixed_permutation(len(members), random_seed, number)]
        begin, end = (seen_after(e, weight, len(members)) for e in (epoch, epoch + 1))
        parts.append(order[np.arange(begin, end) % max(1, len(members))])
    return np.concatenate(parts)


def seen_after(epochs: int, weight: float, n_documents: int) -> int:
    """Documents of a domain that `epochs` epochs see in all; exact for decimal weights."""
    return int(Fraction(str(weight)) * n_documents * epochs)


def effective_tokens(documents: Documents, weights: Mapping[str, float]) -> int:
    """Tokens that an epoch of the weighted mixture has on average."""
    by_domain = np.bincount(
        documents.domain_index, weights=documents.lengths, minlength=len(documents.domains)
    )
    factors = [weights.get(domain, 1.0) for domain in documents.domains]
    return round(float(by_domain @ np.array(factors)))


def check_domains(weights: Mapping[str, float], documents: Documents) -> None:
    """Raises DataError where the weights leave no document."""
    if weights and effective_tokens(documents, weights) == 0:
        raise DataError(
            f"`data.weights` leave nothing to train on: {dict(weights)}",
            hint="give one of the domains a weight above 0",
        )
