import math

import numpy as np
import pytest
import torch

from mixture.small_documents import documents_of
from nn.small_experts import small_expert, text_of
from pyper.data import Documents
from pyper.evaluate import domain_losses, held_out_windows, losses, mean_loss, token_losses


def numbered_documents() -> Documents:
    """Documents of three domains, interleaved; every token but the document token occurs once."""
    lengths = [7, 30, 4, 12, 1, 25, 9, 3]
    domain = [0, 1, 0, 1, 2, 1, 0, 2]
    ends = np.cumsum(lengths)
    texts = [np.arange(end - n + 1, end + 1) for end, n in zip(ends, lengths, strict=True)]
    return documents_of(texts, domain, domains=("a", "b", "c"))


def stream_of(documents: Documents, domain: int) -> list[int]:
    wanted = np.flatnonzero(documents.domain_index == domain)
    return np.concatenate([documents.tokens(int(i)) for i in wanted]).tolist()


def test_windows_are_the_documents_of_each_domain_in_order() -> None:
    documents = numbered_documents()
    windows = held_out_windows(documents, seq_len=8, max_tokens=10_000)
    assert [w.domain for w in windows] == ["a", "b"]  # `c` is shorter than one window
    for index, held_out in enumerate(windows):
        stream = stream_of(documents, index)
        n_windows = (len(stream) - 1) // 8
        assert held_out.n_scored == 8 * n_windows
        for row, window in enumerate(held_out.tokens.tolist()):
            assert window == stream[8 * row : 8 * row + 9]
        # Every token but the first and the rest is predicted exactly once.
        assert held_out.tokens[:, 1:].flatten().tolist() == stream[1 : 1 + 8 * n_windows]


def test_a_limit_takes_windows_spread_over_the_domain() -> None:
    documents = numbered_documents()
    whole = held_out_windows(documents, seq_len=4, max_tokens=10_000)[1].tokens
    some = held_out_windows(documents, seq_len=4, max_tokens=20)[1].tokens
    assert len(some) == 5
    at = [int((whole == row).all(1).nonzero()) for row in some]
    assert at[0] == 0
    assert at[-1] == len(whole) - 1
    assert np.diff(at).max() - np.diff(at).min() <= 1
    assert len(held_out_windows(documents, seq_len=4, max_tokens=1)[1].tokens) == 1


def test_a_domain_of_exactly_one_window_counts() -> None:
    documents = documents_of([np.arange(1, 9)], [0])
    assert held_out_windows(documents, 8, 100)[0].tokens.tolist() == [list(range(9))]
    assert held_out_windows(documents, 9, 100) == []


def test_bytes_are_those_of_the_text_per_token_document_tokens_included() -> None:
    documents = documents_of([np.arange(1, 20)], [0], bytes_per_token=4.25)
    [window] = held_out_windows(documents, 8, 100)
    assert window.bytes_per_token == 4.25


@pytest.mark.parametrize("per_pass", [1, 40, 8192])
def test_token_losses_match_the_obvious_loop(
    per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_TOKENS_PER_PASS", per_pass)
    model, tokens = small_expert(), text_of(5, 12)
    got = token_losses(model, tokens)
    assert got.shape == (5, 11)
    with torch.no_grad():
        for row in range(5):
            for t in range(11):
                said = model(tokens[row : row + 1, : t + 1])[0, -1].double().tolist()
                total = math.log(sum(math.exp(x) for x in said))
                expected = total - said[int(tokens[row, t + 1])]
                assert float(got[row, t]) == pytest.approx(expected, abs=1e-5)


def test_domains_count_by_their_tokens() -> None:
    model, documents = small_expert(vocab_size=100), numbered_documents()
    windows = held_out_windows(documents, seq_len=8, max_tokens=10_000)
    by_domain = domain_losses(model, windows)
    everything = torch.cat([token_losses(model, w.tokens).flatten() for w in windows])
    for window in windows:
        own = token_losses(model, window.tokens).mean()
        assert by_domain[window.domain] == pytest.approx(float(own), abs=1e-6)
    assert mean_loss(by_domain, windows) == pytest.approx(float(everything.mean()), abs=1e-6)
    assert windows[0].n_scored != windows[1].n_scored
