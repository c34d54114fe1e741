"""A bounded sample of the training text, spread over domains, for the tokenizer to learn from."""

from collections.abc import Iterator, Mapping

from pyper.data.splitting import Digest, DomainPlan, cut_document

_TOTAL_CHARS = 20_000_000
_EXCERPTS = 8


class TextSample:
    """About `budget` to `2 * budget` characters of one domain, in a single pass over it.

    A document stays while its hash is below a threshold, which is halved when there is too much:
    the same documents give the same sample, and long sources do not crowd out later ones.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._size, self._threshold = budget, 0, 1 << 64
        self._kept: list[tuple[Digest, str]] = []

    def add(self, text: str, digest: Digest) -> None:
        """Offer a text; of a very long one, some excerpts are taken."""
        if digest.priority >= self._threshold:
            return
        text = _excerpts(text, self._budget)
        self._kept.append((digest, text))
        self._size += len(text)
        self.shrink(self._budget)

    def shrink(self, budget: int) -> None:
        """Change the budget; what is above twice of it is dropped, by hash."""
        self._budget = budget
        while self._size > 2 * self._budget:
            self._threshold //= 2
            self._kept = [(d, t) for d, t in self._kept if d.priority < self._threshold]
            self._size = sum(len(t) for _, t in self._kept)

    def texts(self, plan: DomainPlan) -> Iterator[str]:
        """What belongs to training under `plan`."""
        for digest, text in self._kept:
            if plan.cuts or plan.by_hash(digest) == "train":
                yield text


def new_samples(plans: Mapping[str, DomainPlan]) -> dict[str, TextSample]:
    """One sample for each domain; about 20 M characters in all."""
    return {name: TextSample(_share(len(plans))) for name in plans}


def add_sample(samples: dict[str, TextSample], domain: str) -> None:
    """One more, for a domain that turns up while reading; the others shrink to their share."""
    samples[domain] = TextSample(0)
    for sample in samples.values():
        sample.shrink(_share(len(samples)))


def _share(n_domains: int) -> int:
    return max(10_000, _TOTAL_CHARS * 2 // (3 * max(1, n_domains)))


def trainable_part(text: str, plan: DomainPlan) -> str:
    """The part of a document that is for training even if documents turn out to be cut."""
    return next(cut_document(text, plan.held_out))[1]


def _excerpts(text: str, budget: int) -> str:
    if len(text) <= budget:
        return text
    width, step = budget // _EXCERPTS, len(text) // _EXCERPTS
    return "".join(text[i * step : i * step + width] for i in range(_EXCERPTS))
