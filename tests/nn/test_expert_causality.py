"""Logits at t depend on tokens ≤ t only: nothing before a change may move by a single bit."""

from typing import Any

import pytest
import torch

from nn.small_experts import BOS, change_from, random_cuts, small_expert, text_of
from pyper.nn import Transformer

N_CUTS, LENGTH = 60, 40


def changed_before_the_cut(model: Transformer) -> tuple[int, int]:
    """Logits that a change at ≥ 50 random places moved before it, and after."""
    tokens = text_of(1, LENGTH)
    tokens[:, [0, 13, 27]] = BOS
    tokens = tokens.expand(N_CUTS, -1)
    cuts = random_cuts(N_CUTS, LENGTH)
    # Row by row the same shapes: any difference is information, none is rounding.
    with torch.no_grad():
        before, after = model(tokens), model(change_from(tokens, cuts))
    moved = (before != after).any(-1)
    earlier = torch.arange(LENGTH) < cuts[:, None]
    return int((moved & earlier).sum()), int((moved & ~earlier).sum())


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu", "relu2"])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "qk_norm": True}])
def test_a_change_moves_no_earlier_logit(
    activation: str, across: bool, changes: dict[str, Any]
) -> None:
    model = small_expert(activation=activation, attend_across_documents=across, **changes)
    earlier, later = changed_before_the_cut(model)
    assert earlier == 0
    assert later > N_CUTS * LENGTH / 3


def test_the_check_sees_a_model_that_looks_ahead() -> None:
    class Peeking(Transformer):
        def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
            states = super().hidden(tokens)
            return states + 1e-3 * states.mean(dim=1, keepdim=True)

    model = Peeking(small_expert().config)
    model.load_state_dict(small_expert().state_dict())
    assert changed_before_the_cut(model)[0] > 0


def two_documents() -> tuple[torch.Tensor, torch.Tensor]:
    first, second = text_of(3, 11), text_of(3, 14, seed=5)
    first[:, 0] = second[:, 0] = BOS
    return first, second


@torch.no_grad()
def test_each_document_reads_as_if_it_were_alone() -> None:
    model = small_expert(attend_across_documents=False, n_kv_heads=2)
    first, second = two_documents()
    together = model(torch.cat([first, second], dim=1))
    torch.testing.assert_close(together[:, :11], model(first), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:, 11:], model(second), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("across", [True, False])
@torch.no_grad()
def test_another_document_matters_only_when_attended_to(across: bool) -> None:
    model = small_expert(attend_across_documents=across)
    first, second = two_documents()
    other = first.clone()
    other[:, 1:] = text_of(3, 10, seed=9)
    before = model(torch.cat([first, second], dim=1))[:, 11:]
    after = model(torch.cat([other, second], dim=1))[:, 11:]
    assert torch.equal(before, after) is not across
