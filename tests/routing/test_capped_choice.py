import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from torch import Tensor

from pyper.errors import ConfigError
from pyper.routing import as_mask, capped_assignment, choose_tokens, choose_tokens_capped


def softmax_scores(n: int, e: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    logits = torch.randn(n, e, generator=torch.Generator().manual_seed(seed))
    return (spread * logits + 0.3 * torch.arange(e)).softmax(dim=-1)


def constraints(n: int, e: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column sums of an (N, E) that is flattened, as matrices."""
    return np.kron(np.eye(n), np.ones(e)), np.kron(np.ones(n), np.eye(e))


def linear_optimum(scores: Tensor, capacity: int, max_experts: int) -> float:
    n, e = scores.shape
    rows, columns = constraints(n, e)
    found = linprog(
        -scores.double().numpy().ravel(),
        A_ub=rows,
        b_ub=np.full(n, max_experts),
        A_eq=columns,
        b_eq=np.full(e, capacity),
        bounds=(0, 1),
    )
    return -float(found.fun)


def entropic_optimum(
    scores: Tensor, capacity: int, max_experts: int, entropy_weight: float
) -> np.ndarray:
    """max ⟨S, A⟩ + λH(A) by sequential quadratic programming."""
    n, e = scores.shape
    s, (rows, columns) = scores.double().numpy().ravel(), constraints(n, e)
    found = minimize(
        lambda a: -s @ a + entropy_weight * (a * np.log(a)).sum(),
        np.full(n * e, capacity / n),
        jac=lambda a: -s + entropy_weight * (np.log(a) + 1),
        method="SLSQP",
        bounds=[(1e-12, 1)] * (n * e),
        constraints=[
            {"type": "eq", "fun": lambda a: columns @ a - capacity, "jac": lambda a: columns},
            {"type": "ineq", "fun": lambda a: max_experts - rows @ a, "jac": lambda a: -rows},
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success
    return found.x.reshape(n, e)


@pytest.mark.parametrize("entropy_weight", [0.03, 0.1, 1.0])
@pytest.mark.parametrize(("capacity", "max_experts"), [(2, 2), (3, 2), (2, 1), (4, 3)])
def test_it_is_the_regularised_optimum(
    capacity: int, max_experts: int, entropy_weight: float
) -> None:
    scores = softmax_scores(7, 3, seed=1, spread=2).double()
    got = capped_assignment(
        scores, capacity, max_experts, entropy_weight=entropy_weight, iterations=3000
    )
    expected = entropic_optimum(scores, capacity, max_experts, entropy_weight)
    # the iteration ends within 1e-3 of the cap
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("capacity", "max_experts"), [(8, 2), (12, 2), (5, 1), (18, 3)])
def test_little_entropy_gives_the_optimum_of_the_linear_programme(
    capacity: int, max_experts: int, seed: int
) -> None:
    scores = softmax_scores(32, 4, seed=seed)
    best = linear_optimum(scores, capacity, max_experts)
    lost = []
    for entropy_weight in (0.1, 0.01, 0.001):
        a = capped_assignment(
            scores, capacity, max_experts, entropy_weight=entropy_weight, iterations=2000
        )
        assert float(a.sum(dim=1).max()) < max_experts + 2e-3
        lost.append(best - float((scores * a).sum()))
    assert lost[0] > lost[1] > lost[2] - 1e-3
    assert abs(lost[2]) < 2e-3 * best


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    e=st.integers(1, 8),
    spread=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_constraints_hold_where_there_is_room(
    n: int, e: int, spread: float, seed: int, data: st.DataObject
) -> None:
    max_experts = data.draw(st.integers(1, e + 1))
    room = min(max_experts, e) * n // e
    assume(room > 0)
    capacity = data.draw(st.integers(1, room))
    scores = softmax_scores(n, e, seed=seed, spread=spread)
    a = capped_assignment(scores, capacity, max_experts, entropy_weight=0.05, iterations=3000)
    assert a.isfinite().all()
    assert ((a >= 0) & (a <= 1)).all()
    torch.testing.assert_close(a.sum(dim=0), torch.full((e,), float(capacity)), rtol=1e-4, atol=0)
    assert float(a.sum(dim=1).max()) < max_experts + 2e-3


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("max_experts", "over"), [(3, 2e-3), (2, 0.1)])
def test_the_usual_size_is_solved_in_float32_with_the_usual_settings(
    spread: float, max_experts: int, over: float
) -> None:
    scores = softmax_scores(8192, 8, spread=spread)
    a = capped_assignment(scores, 2048, max_experts)  # at b = 2 the constraints leave no room
    assert a.dtype == torch.float32
    assert ((a >= 0) & (a <= 1)).all()
    torch.testing.assert_close(a.sum(dim=0), torch.full((8,), 2048.0), rtol=1e-3, atol=0)
    assert float(a.sum(dim=1).max()) < max_experts + over


@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("capacity", "max_experts"), [(128, 3), (128, 2), (64, 1), (64, 2)])
def test_few_tokens_or_none_have_more_experts_than_the_cap(
    capacity: int, max_experts: int, spread: float
) -> None:
    scores = softmax_scores(512, 8, spread=spread)
    a = capped_assignment(scores, capacity, max_experts)
    taken = as_mask(choose_tokens_capped(scores, capacity, max_experts).token_index, 512)
    assert taken.sum(dim=0).tolist() == [capacity] * 8
    over = (taken.sum(dim=1) > max_experts).sum()
    full = capacity * 8 == max_experts * 512
    assert over <= (512 * 0.025 if full else 0)
    assert float(scores[taken].sum()) > float((scores * a).sum()) - 0.2  # of 64 to 512


def test_equal_scores_are_spread_over_the_tokens() -> None:
    taken = as_mask(choose_tokens_capped(torch.full((64, 8), 0.125), 8, 1).token_index, 64)
    assert taken.sum(dim=1).tolist() == [1] * 64


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), e=st.integers(2, 8), seed=st.integers(0, 99), data=st.data())
def test_a_cap_of_all_experts_is_plain_expert_choice(
    n: int, e: int, seed: int, data: st.DataObject
) -> None:
    capacity = data.draw(st.integers(1, n))
    scores = softmax_scores(n, e, seed=seed)
    plain = choose_tokens(scores, capacity)
    for max_experts in (e, e + 3):
        capped = choose_tokens_capped(scores, capacity, max_experts)
        assert torch.equal(as_mask(capped.token_index, n), as_mask(plain.token_index, n))
        assert torch.equal(capped.kth_score, plain.kth_score)


def test_a_token_that_all_experts_want_goes_to_those_that_want_it_most() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.8, 0.1, 0.1], [0.1, 0.5, 0.2], [0.1, 0.1, 0.3]])
    plain = as_mask(choose_tokens(scores, 1).token_index, 4)
    assert plain.sum(dim=1).tolist() == [3, 0, 0, 0]
    assert choose_tokens_capped(scores, 1, 2).token_index.squeeze(1).tolist() == [1, 0, 0]
    assert choose_tokens_capped(scores, 1, 1).token_index.squeeze(1).tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_neither_taken_nor_counted(seed: int) -> None:
    scores = softmax_scores(60, 4, seed=seed)
    padding = torch.arange(60) % 3 == 1
    scores[padding] = 5.0
    choice = choose_tokens_capped(scores, 15, 2, padding)
    mask = as_mask(choice.token_index, 60)
    assert mask.sum(dim=0).tolist() == [15] * 4
    assert not mask[padding].any()
    assert mask.sum(dim=1).max() <= 2
    real = choose_tokens_capped(scores[~padding], 15, 2)
    assert torch.equal(as_mask(real.token_index, 40), mask[~padding])
    assert torch.equal(real.kth_score, choice.kth_score)


def test_the_kth_score_is_the_lowest_score_that_was_taken() -> None:
    scores = softmax_scores(40, 4)
    choice = choose_tokens_capped(scores.requires_grad_(), 10, 1)
    assert not choice.kth_score.requires_grad
    for expert in range(4):
        taken = [float(scores.detach()[i, expert]) for i in choice.token_index[expert]]
        assert float(choice.kth_score[expert]) == min(taken)
        assert len(set(choice.token_index[expert].tolist())) == 10


def test_more_than_fits_under_the_cap_is_refused() -> None:
    scores = softmax_scores(16, 4)
    assert capped_assignment(scores, 8, 2).isfinite().all()
    with pytest.raises(ConfigError, match="4 experts cannot take 9 of 16 tokens") as caught:
        capped_assignment(scores, 9, 2)
    assert "capacity_factor" in caught.value.hint
    with pytest.raises(ConfigError, match="at most 4"):
        capped_assignment(scores, 17, 5)
