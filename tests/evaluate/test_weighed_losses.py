"""Held-out losses of chats: only predictions that count are counted, in every arm."""

import dataclasses

import numpy as np
import pytest
import torch

from mixture.small_documents import documents_of
from mixture.small_scores import PREFIXES, TEMPERATURE, small_held_out, small_scores
from nn.small_experts import small_expert
from pyper.data import Documents
from pyper.evaluate import (
    HeldOut,
    Scores,
    domain_losses,
    evaluation_report,
    fit_temperature,
    held_out_windows,
    losses_of_modes,
    mean_loss,
    token_losses,
)


def weighed(documents: Documents, weights: np.ndarray) -> Documents:
    """The same documents with weights on the tokens of their one shard."""
    return Documents(
        documents.shards,
        shard_index=documents.shard_index,
        starts=documents.starts,
        lengths=documents.lengths,
        n_bytes=documents.n_bytes,
        domain_index=documents.domain_index,
        domains=documents.domains,
        fingerprint=documents.fingerprint,
        bos_id=documents.bos_id,
        weights=[weights.astype(np.uint8)],
    )


def test_windows_without_a_prediction_that_counts_are_left_out() -> None:
    plain = documents_of([np.arange(1, 33), np.arange(33, 65)], [0, 0])
    weights = np.zeros(len(plain.shards[0]))
    weights[18:20] = weights[40] = 1
    [window] = held_out_windows(weighed(plain, weights), 8, 10_000)
    assert window.tokens[:, 0].tolist() == [16, 32]
    assert window.weights is not None
    assert window.n_scored == 3
    assert window.weights.nonzero().tolist() == [[0, 1], [0, 2], [1, 7]]
    assert held_out_windows(weighed(plain, weights * 0), 8, 10_000) == []


def marks(held_out: HeldOut, seed: int) -> HeldOut:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(held_out.tokens), held_out.tokens.shape[1] - 1)
    return dataclasses.replace(
        held_out, weights=(torch.rand(shape, generator=generator) < 0.4).float()
    )


def test_domain_and_mean_losses_are_those_of_a_loop_over_predictions() -> None:
    model = small_expert(3)
    held_out = [marks(h, i) for i, h in enumerate(small_held_out())]
    everything: list[float] = []
    for h in held_out:
        losses = token_losses(model, h.tokens)
        assert h.weights is not None
        own = [
            float(losses[n, t])
            for n in range(len(losses))
            for t in range(losses.shape[1])
            if h.weights[n, t]
        ]
        assert domain_losses(model, [h])[h.domain] == pytest.approx(np.mean(own), abs=1e-6)
        everything += own
    by_domain = domain_losses(model, held_out)
    assert mean_loss(by_domain, held_out) == pytest.approx(np.mean(everything), abs=1e-6)


def only(scores: Scores, keep: torch.Tensor) -> Scores:
    """Scores with the weights `keep` (N, T)."""
    return dataclasses.replace(scores, weights=keep.float())


def test_every_arm_of_a_report_counts_what_counts() -> None:
    """Weights on the second half are the mean over the second half of the unweighed losses."""
    whole = small_scores()
    half = whole[0].experts.shape[1] // 2
    keep = [torch.zeros(s.experts.shape[:2]) for s in whole]
    for k in keep:
        k[:, half:] = 1
    settings = {"temperature": TEMPERATURE, "prefixes": PREFIXES, "prices": None}
    names = [f"e{i}" for i in range(whole[0].experts.shape[-1])]
    report = evaluation_report(
        [only(s, k) for s, k in zip(whole, keep, strict=True)], experts=names, **settings
    )
    rows = [losses_of_modes(s, **settings) for s in whole]

    def mean(part: list[torch.Tensor]) -> float:
        return float(torch.cat([p[:, half:].flatten() for p in part]).double().mean())

    assert report["tokens"] == sum(int(k.sum()) for k in keep)
    assert report["control"] == pytest.approx(mean([r.control for r in rows]), abs=2e-5)
    assert report["router_entropy"] == pytest.approx(mean([r.entropy for r in rows]), abs=2e-5)
    for n in PREFIXES:
        expected = mean([r.routed[n] for r in rows])
        assert report["routed"][str(n)] == pytest.approx(expected, abs=2e-5)
    for k in ("top1", "top2", "all"):
        assert report["posterior"][k] == pytest.approx(
            mean([r.posterior[k] for r in rows]), abs=2e-5
        )
    best = torch.cat([s.experts[:, half:].sum(1).max(-1).values for s in whole])
    assert report["oracle"] == pytest.approx(-float(best.mean()) / half, abs=2e-5)
    part = report["prefix_and_rest"][str(PREFIXES[0])]
    assert part["prefix"]["routed"] is None or PREFIXES[0] > half
    assert part["rest"]["control"] == report["control"]


def test_weights_of_one_change_no_number() -> None:
    settings = {"temperature": TEMPERATURE, "prefixes": PREFIXES, "prices": None}
    whole = small_scores()
    names = [f"e{i}" for i in range(whole[0].experts.shape[-1])]
    ones = [only(s, torch.ones(s.experts.shape[:2])) for s in whole]
    assert evaluation_report(ones, experts=names, **settings) == evaluation_report(
        whole, experts=names, **settings
    )
    assert fit_temperature(ones, 2) == fit_temperature(whole, 2)
