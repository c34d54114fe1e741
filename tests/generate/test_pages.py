"""Pages are handed out once, shared by equal beginnings, and forgotten in order of use."""

import random

import pytest

from pyper.generate.pages import Page, PagePool
from pyper.nn import PAGE_TOKENS


def tokens(*numbers: int) -> list[int]:
    """One page for each number."""
    return [n for n in numbers for _ in range(PAGE_TOKENS)]


def fill(pool: PagePool, text: list[int], root: int = 0, scored: bool = True) -> list[int]:
    """Read a text: the pages it begins with are found, the others published."""
    found = pool.find(root, text, scored=len(text) if scored else 0)
    pages = [page.number for page in found]
    for start in range(len(pages) * PAGE_TOKENS, len(text), PAGE_TOKENS):
        part = text[start : start + PAGE_TOKENS]
        pages.append(pool.take())
        if len(part) == PAGE_TOKENS:
            scores = (1.0,) * PAGE_TOKENS if scored else None
            found.append(pool.publish(root, found, pages[-1], part, scores))
    return pages


def test_equal_beginnings_share_pages_and_different_ones_do_not() -> None:
    pool = PagePool(20)
    first = fill(pool, tokens(1, 2, 3))
    assert fill(pool, tokens(1, 2, 4))[:2] == first[:2]
    assert pool.n_used == 4
    assert not set(fill(pool, tokens(2, 2, 3))) & set(first)
    assert not set(fill(pool, tokens(1, 2, 3), root=1)) & set(first)


def test_a_page_is_only_found_with_the_scores_that_are_needed() -> None:
    pool = PagePool(4)
    fill(pool, tokens(1, 2), scored=False)
    assert pool.find(0, tokens(1, 2), scored=1) == []
    assert len(pool.find(0, tokens(1, 2), scored=0)) == 2


def test_an_incomplete_page_is_nobody_elses() -> None:
    pool = PagePool(4)
    text = tokens(1) + [7] * (PAGE_TOKENS - 1)
    assert fill(pool, text)[0] == fill(pool, text)[0]
    assert pool.n_used == 3


def test_pages_stay_readable_until_their_room_is_needed_the_oldest_text_first() -> None:
    pool = PagePool(4)
    for text in (tokens(1, 2), tokens(3, 4)):
        pool.release(fill(pool, text))
    assert pool.n_used == 0
    pool.release(fill(pool, tokens(1, 2)))  # used again
    fresh = pool.take()
    assert [len(pool.find(0, tokens(*text), scored=0)) for text in [(1, 2), (3, 4)]] == [2, 1]
    assert fresh not in [page.number for page in pool.find(0, tokens(1, 2), scored=0)]


def test_two_texts_that_read_the_same_at_once_keep_their_own_pages() -> None:
    pool = PagePool(4)
    mine, other = pool.take(), pool.take()
    page = pool.publish(0, [], mine, tokens(5), None)
    assert pool.publish(0, [], other, tokens(5), (2.0,)) is page
    assert (page.number, page.scores) == (mine, (2.0,))
    pool.release([other])
    assert pool.n_used == 1
    assert [p.number for p in pool.find(0, tokens(5), scored=1)] == [mine]


def test_a_page_number_that_is_used_again_does_not_bring_back_what_followed_it() -> None:
    pool = PagePool(2)
    pool.release(fill(pool, tokens(1, 2)))
    pool.take()  # evicts the end of the text
    assert pool.take() != 0  # and its beginning
    assert pool.find(0, tokens(1, 2), scored=0) == []


@pytest.mark.parametrize("seed", range(5))
def test_no_page_ever_has_two_contents(seed: int) -> None:
    """Random texts come and go; a copy of every page's text shows what the pool promises."""
    rng, pool, holds = random.Random(seed), PagePool(12), dict[int, list[int]]()
    open_texts: list[list[int]] = []
    for _ in range(400):
        if open_texts and (rng.random() < 0.5 or pool.n_used > 8):
            pool.release(open_texts.pop(rng.randrange(len(open_texts))))
            continue
        text = tokens(*(rng.randrange(2) for _ in range(rng.randrange(1, 5))))
        before = {n for pages in open_texts for n in pages}
        found = pool.find(0, text, scored=0)
        pages = [page.number for page in found]
        for number, page in enumerate(pages):
            assert holds[page] == text[: (number + 1) * PAGE_TOKENS]
        for start in range(len(pages) * PAGE_TOKENS, len(text), PAGE_TOKENS):
            pages.append(pool.take())
            assert pages[-1] not in before
            holds[pages[-1]] = text[: start + PAGE_TOKENS]
            found.append(pool.publish(0, found, pages[-1], text[start : start + PAGE_TOKENS], None))
        open_texts.append(pages)
        assert pool.n_used == len({n for t in open_texts for n in t})
    for pages in open_texts:
        pool.release(pages)
    assert pool.n_used == 0
    assert isinstance(found[0], Page)
