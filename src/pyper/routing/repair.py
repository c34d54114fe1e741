"""From nearly balanced to exactly balanced, at the smallest loss of score.

Under prices b every sequence sits where S − b is largest, so the assignment is the best one for the
loads it has. Successive shortest paths (Ahuja, Magnanti & Orlin, Network Flows, section 9.7) keep
that true while moving one sequence at a time along e → f → … → g, from an overfull expert to one
with room: when the loads are right, the assignment is the optimum of the linear assignment, and the
prices, moved along, prove it. The graph has E nodes; an edge costs what the cheapest sequence of e
loses by going to f.
"""

import heapq
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_MAX_ENTRIES = 1 << 19  # candidates held at a time, over all pairs of experts


def repair_counts(
    scores: Tensor, expert: Tensor, prices: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Move sequences until expert e has exactly `target[e]` of them; returns experts and prices.

    `scores` (N, E), `expert` (N,) the argmax of S − b for `prices` b (E,), `target` (E,) int64.
    """
    excess = torch.bincount(expert, minlength=len(prices)).cpu() - target.cpu()
    owner = expert.cpu().numpy().copy()
    b = prices.double().cpu().numpy().copy()
    left = excess.numpy().copy()
    while (n_moves := int(left.clip(min=0).sum())) > 0:
        keep = min(n_moves, max(16, _MAX_ENTRIES // len(b) ** 2))
        moves = _Moves(scores, owner, keep)
        for _ in range(keep):
            moves.run(_shortest_path(moves.costs(), b, left), left)
    return torch.from_numpy(owner).to(expert.device), torch.from_numpy(b).to(prices.device)


class _Moves:
    """The cheapest moves between all pairs of experts.

    A path takes at most one sequence from an expert, so the `keep` cheapest of each pair are all
    that `keep` paths can need.
    """

    def __init__(self, scores: Tensor, owner: NDArray[np.int64], keep: int) -> None:
        self.scores = scores
        self.owner = owner
        n_experts = scores.shape[1]
        on_device = torch.from_numpy(owner).to(scores.device)
        self.heaps = [_candidates(scores, on_device, e, keep) for e in range(n_experts)]
        self.cost = np.full((n_experts, n_experts), np.inf)
        for e in range(n_experts):
            self._refresh(e)

    def costs(self) -> Floats:
        """Loss (E, E) in nats of the cheapest move from row to column; inf where none is left."""
        return self.cost

    def run(self, path: list[int], left: NDArray[np.int64]) -> None:
        """Move one sequence along each edge of `path`, the cheapest one."""
        steps = [(e, f, self.heaps[e][f][0][1]) for e, f in pairwise(path)]
        for _, f, n in steps:
            self.owner[n] = f
            row = self.scores[n].double()
            for g, loss in enumerate((row[f] - row).tolist()):
                heapq.heappush(self.heaps[f][g], (loss, n))
        left[path[0]] -= 1
        left[path[-1]] += 1
        for e in path:
            self._refresh(e)

    def _refresh(self, e: int) -> None:
        """Drop the sequences that have left e from the tops of its heaps."""
        for f, heap in enumerate(self.heaps[e]):
            while heap and self.owner[heap[0][1]] != e:
                heapq.heappop(heap)
            self.cost[e, f] = heap[0][0] if heap and f != e else np.inf


def _candidates(scores: Tensor, owner: Tensor, e: int, keep: int) -> list[list[tuple[float, int]]]:
    """For each other expert, the `keep` sequences of e that lose least by moving there."""
    members = torch.nonzero(owner == e).squeeze(1)
    own = scores[members]
    own = own if own.dtype == torch.float64 else own.float()
    loss = own[:, e : e + 1] - own
    values, index = loss.topk(min(keep, len(members)), dim=0, largest=False, sorted=True)
    names = members[index].T.tolist()
    return [list(zip(v, n, strict=True)) for v, n in zip(values.T.tolist(), names, strict=True)]


def _shortest_path(cost: Floats, prices: Floats, left: NDArray[np.int64]) -> list[int]:
    """Dijkstra from all overfull experts to the nearest with room; moves `prices` along (in place).

    Reduced costs c − b_e + b_f are ≥ 0 at the optimum of the current loads; what rounding (or the
    dither of the search) leaves below is clipped.
    """
    reduced = np.maximum(cost - prices[:, None] + prices[None, :], 0.0)
    distance = np.where(left > 0, 0.0, np.inf)
    parent = np.full(len(prices), -1)
    open_ = np.ones(len(prices), dtype=bool)
    while True:
        e = int(np.where(open_, distance, np.inf).argmin())
        open_[e] = False
        if left[e] < 0:
            break
        through = distance[e] + reduced[e]
        closer = open_ & (through < distance)
        distance[closer], parent[closer] = through[closer], e
    prices -= np.minimum(distance, distance[e])
    path = [e]
    while parent[path[-1]] >= 0:
        path.append(int(parent[path[-1]]))
    return path[::-1]
