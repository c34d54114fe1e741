"""Step-by-step decoding of a mixture: which experts run, and how they are mixed."""

import torch
from torch import Tensor

from pyper.mixture import Mixture
from pyper.mixture.mixing import mixing_log_weights
from pyper.nn import KVCache
from pyper.routing import mix_log_probs, posterior_log_weights, prune


class MixtureDecoder:
    """All rows of a batch under one mixture.

    Which weights apply is decided by the same rules that score text (`mixture/mixing.py`), from
    the same scores; this class only sees to it that no expert runs for nothing. With `prune = 0`
    decoding and scoring agree exactly.
    """

    def __init__(self, mixture: Mixture, prompts: list[list[int]], capacity: int) -> None:
        """Prompts are token lists that begin with the document token; `capacity` is in tokens."""
        self.mixture, self.settings = mixture, mixture.settings
        self.capacity = capacity
        n_rows, n_experts = len(prompts), mixture.n_experts
        self.lengths = torch.tensor([len(p) for p in prompts])
        self.tokens = torch.zeros(n_rows, capacity, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self.tokens[row, : len(prompt)] = torch.tensor(prompt)
        self.live = torch.ones(n_rows, n_experts, dtype=torch.bool)
        """(B, E), experts that still run under `posterior`."""
        self._settled = torch.zeros(n_rows, dtype=torch.bool)
        """(B,), rows for which `top1` has all that its choice depends on."""
        self._caches: dict[int, KVCache] = {}
        self._last: dict[int, Tensor] = {}
        # log p_e(x_{t+1} | x_≤t) as far as each expert has read, (B, capacity, E).
        self._scores = torch.zeros(n_rows, capacity, n_experts)

    @torch.no_grad()
    def next_log_probs(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """log p(next) (R, V) on the CPU for the rows (R,), and the weights (R, E) behind it."""
        # 1. what the rule needs to know of every expert
        evidence = torch.tensor([self._evidence_length(int(n)) for n in self.lengths])
        evidence[self._settled] = 0
        for expert in range(self.mixture.n_experts):
            self._read(expert, rows[self.live[rows, expert]], evidence)
        # 2. the rule
        log_weights = self._log_weights(rows)
        # 3. the experts that write, where they have not read everything yet
        used = torch.isfinite(log_weights)
        for expert in range(self.mixture.n_experts):
            self._read(expert, rows[used[:, expert]], self.lengths)
        self._forget_unused(used, rows)
        active = [e for e in range(self.mixture.n_experts) if bool(used[:, e].any())]
        per_expert = torch.stack([self._last[e][rows] for e in active], dim=1)
        mixed = mix_log_probs(log_weights[:, active], per_expert.cpu())
        return mixed, log_weights.exp()

    def append(self, rows: Tensor, tokens: Tensor) -> None:
        """Add one token (R,) to each of the rows (R,)."""
        self.tokens[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1

    def _evidence_length(self, n: int) -> int:
        """How many of a row's n tokens all experts must read before the next is predicted."""
        settings, own_router = self.settings, self.mixture.router is not None
        if settings.mixing == "top1":
            cold = settings.prefix_tokens
            return (n if n <= cold else 0) if own_router else min(n, cold + 1)
        if settings.mixing == "window" and own_router:
            return n if n <= settings.window else 0
        return n

    def _log_weights(self, rows: Tensor) -> Tensor:
        """Log weights (R, E) of the next prediction."""
        longest = int(self.lengths[rows].max())
        tokens, scores = self.tokens[rows, :longest], self._scores[rows, :longest]
        router_scores = scores
        if self.mixture.router is not None and self.settings.mixing != "posterior":
            read = self.mixture.router.token_scores(tokens)
            router_scores = torch.nn.functional.pad(read, (0, 0, 0, 1))
        if self.settings.mixing == "posterior":
            self._drop_unlikely(rows, scores)
            scores = self._scores[rows, :longest]
        log_weights = mixing_log_weights(self.settings, scores, router_scores)
        return log_weights[torch.arange(len(rows)), self.lengths[rows] - 1]

    def _drop_unlikely(self, rows: Tensor, scores: Tensor) -> None:
        """Experts whose weight fell below `prune` stop for good."""
        if self.settings.prune == 0:
            return
        # Many experts begin with little each: half of an equal share is no evidence against one.
        threshold = min(self.settings.prune, 0.5 / self.mixture.n_experts)
        posterior = posterior_log_weights(scores, temperature=self.settings.temperature)
        now = posterior[torch.arange(len(rows)), self.lengths[rows] - 1]
        self.live[rows] &= torch.isfinite(prune(now, threshold))
        row, expert = torch.nonzero(~self.live[rows], as_tuple=True)
        self._scores[rows[row], 0, expert] = -torch.inf

    def _read(self, expert: int, rows: Tensor, upto: Tensor) -> None:
        """Let an expert read the rows (R,) up to lengths `upto` (B,), where it has not yet."""
        cache = self._caches.get(expert)
        if cache is not None:
            rows = rows[upto[rows] > cache.lengths.cpu()[rows]]
        rows = rows[upto[rows] > 0]
        if len(rows) == 0:
            return
        model = self.mixture.expert(expert)
        if cache is None:
            cache = KVCache.allocate(
                model.config,
                len(self.tokens),
                self.capacity,
                device=model.device,
                dtype=model.dtype,
            )
            self._caches[expert] = cache
        whole = len(rows) == len(self.tokens)
        part = cache if whole else cache.select_rows(rows.to(model.device))
        start = part.lengths.cpu()
        n_new = upto[rows] - start
        new = self._slice(rows, start, int(n_new.max()))
        states = model.extend(new.to(model.device), part, n_new.to(model.device))
        if not whole:
            cache.update_rows(rows.to(model.device), part)
        log_probs = model.head(states).float().log_softmax(dim=-1)
        self._keep_scores(expert, rows, start, n_new, log_probs)

    def _slice(self, rows: Tensor, start: Tensor, length: int) -> Tensor:
        """Tokens (R, length) of each row from its own start; past the end it repeats the last."""
        index = start[:, None] + torch.arange(length)
        return self.tokens[rows].gather(1, index.clamp(max=self.capacity - 1))

    def _keep_scores(
        self, expert: int, rows: Tensor, start: Tensor, n_new: Tensor, log_probs: Tensor
    ) -> None:
        """Remember the prediction after the last token, and how likely the tokens read were."""
        ends = log_probs[torch.arange(len(rows)), (n_new - 1).to(log_probs.device)]
        last = self._last.get(expert)
        before = None if last is None else last[rows].to(ends.device)
        if last is None:
            self._last[expert] = torch.zeros(len(self.tokens), ends.shape[-1], device=ends.device)
        self._last[expert][rows.to(ends.device)] = ends
        # The first new token was predicted by the previous read, the others by this one.
        predictions = (
            log_probs.new_zeros(len(rows), 1, log_probs.shape[-1])
            if before is None
            else before[:, None]
        )
        predictions = torch.cat([predictions, log_probs[:, :-1]], dim=1)
        new = self._slice(rows, start, log_probs.shape[1]).to(log_probs.device)
        scores = predictions.gather(-1, new[..., None]).squeeze(-1).cpu()
        for i, row in enumerate(rows.tolist()):
            first, count = int(start[i]), int(n_new[i])
            skip = 1 if first == 0 else 0  # the first token of a row is given, not predicted
            self._scores[row, first + skip - 1 : first + count - 1, expert] = scores[i, skip:count]

    def _forget_unused(self, used: Tensor, rows: Tensor) -> None:
        """Under `top1` an expert that no row settled on is not needed again."""
        if self.settings.mixing != "top1":
            return
        self._settled[rows] = self.lengths[rows] > self.settings.prefix_tokens
        if not bool(self._settled[rows].all()):
            return
        for expert in [e for e in self._caches if not bool(used[:, e].any())]:
            del self._caches[expert], self._last[expert]
