"""Who owns which page of the cache; texts that begin alike share the pages of their beginning."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyper.nn import PAGE_TOKENS


@dataclass
class Page:
    """A full page that others may read too."""

    number: int
    serial: int
    """Never used twice, unlike the number."""
    scores: tuple[float, ...] | None
    """log p of each of its tokens under the expert that read them; None where nobody asked."""
    users: int = 1


@dataclass
class PagePool:
    """Pages 1 … n of a fixed pool, handed out one by one.

    A full page is known by its tokens and by the page before it, so equal keys are equal texts (no
    hashes that could collide). Pages without users stay readable until their room is needed: the
    one that was used longest ago goes first.
    """

    n_pages: int
    _free: list[int] = field(init=False)
    _by_key: dict[tuple[int, tuple[int, ...]], Page] = field(default_factory=dict, init=False)
    _key_of: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict, init=False)
    _unused: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False)
    _serial: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._free = list(range(self.n_pages, 0, -1))

    @property
    def n_used(self) -> int:
        """Pages that somebody uses now."""
        return self.n_pages - len(self._free) - len(self._unused)

    def take(self) -> int:
        """A page that nobody uses. The caller has reserved it: running out is a bug."""
        if not self._free:
            number, _ = self._unused.popitem(last=False)
            del self._by_key[self._key_of.pop(number)]
            return number
        return self._free.pop()

    def find(self, root: int, tokens: Sequence[int], *, scored: int) -> list[Page]:
        """Pages that hold the beginning of `tokens`; each has one more user now.

        root: the expert that read them. The first `scored` tokens must come with their scores.
        """
        found: list[Page] = []
        for start in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
            page = self._by_key.get(_key(root, found, tokens[start : start + PAGE_TOKENS]))
            if page is None or (page.scores is None and start < scored):
                break
            page.users += 1
            self._unused.pop(page.number, None)
            found.append(page)
        return found

    def publish(
        self,
        root: int,
        before: list[Page],
        number: int,
        tokens: Sequence[int],
        scores: tuple[float, ...] | None,
    ) -> Page:
        """Let others read a full page; gives the page by which the next one is known.

        Where another text was first, this one keeps its own copy, unpublished.
        """
        key = _key(root, before, tokens)
        page = self._by_key.get(key)
        if page is None:
            self._serial += 1
            page = self._by_key[key] = Page(number, self._serial, scores)
            self._key_of[number] = key
        page.scores = page.scores or scores
        return page

    def release(self, numbers: Sequence[int]) -> None:
        """One user less for each page; the end of a text is forgotten before its beginning."""
        for number in reversed(numbers):
            key = self._key_of.get(number)
            if key is None:
                self._free.append(number)
                continue
            page = self._by_key[key]
            page.users -= 1
            if page.users == 0:
                self._unused[number] = None


def _key(root: int, before: list[Page], tokens: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    return (before[-1].serial if before else -1 - root, tuple(tokens))
