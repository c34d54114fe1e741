"""Experts and a router as one language model."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from pyper.errors import CheckpointError
from pyper.mixture.mixing import inference_prices, mixing_log_weights
from pyper.mixture.router import PrefixRouter, UnigramRouter
from pyper.mixture.settings import MixtureSettings
from pyper.nn import Transformer
from pyper.routing import mix_log_probs, route_prefix, scaled_prices

ExpertLoader = Callable[[], Transformer]


class Mixture:
    """Whole experts joined by a causal routing rule.

    Experts are loaded when they are needed; `resident` bounds how many stay in memory, so that
    one expert's memory suffices for `top1`.
    """

    def __init__(
        self,
        settings: MixtureSettings,
        loaders: Sequence[ExpertLoader],
        router: PrefixRouter | None,
        *,
        resident: int | None = None,
    ) -> None:
        """`router` None: the experts themselves read the prefix (`router = "experts"`)."""
        self.settings = settings
        self.router = router
        self._loaders = list(loaders)
        self._resident = resident or len(loaders)
        self._loaded: OrderedDict[int, Transformer] = OrderedDict()
        self._coming: tuple[int, Future[Transformer]] | None = None

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self._loaders)

    @property
    def n_loaded(self) -> int:
        """How many experts are in memory now."""
        return len(self._loaded) + (self._coming is not None)

    @property
    def resident(self) -> int:
        """How many experts may be in memory."""
        return self._resident

    def is_loaded(self, index: int) -> bool:
        """Whether an expert can be used without waiting for it."""
        if self._coming is not None and self._coming[1].done():
            self._settle()
        return index in self._loaded

    def expert(self, index: int) -> Transformer:
        """Expert `index`, loaded on first use; the least recently used one makes room."""
        if index not in self._loaded:
            self._settle()
        if index not in self._loaded:
            self._make_room()
            self._loaded[index] = self._loaders[index]()
        self._loaded.move_to_end(index)
        return self._loaded[index]

    def load_ahead(self, index: int) -> None:
        """Begin to load an expert beside what goes on; the least recently used one makes room.

        One at a time: while another is coming, nothing happens.
        """
        if self._coming is None and not self.is_loaded(index):
            self._make_room()
            pool = ThreadPoolExecutor(max_workers=1)
            self._coming = index, pool.submit(self._loaders[index])
            pool.shutdown(wait=False)  # it ends with this expert

    def _settle(self) -> None:
        """Wait for the expert that is being loaded, if there is one."""
        if self._coming is not None:
            index, coming = self._coming
            self._coming = None
            self._loaded[index] = coming.result()

    def _make_room(self) -> None:
        while len(self._loaded) >= self._resident:
            self._loaded.popitem(last=False)

    # Scoring

    @torch.no_grad()
    def log_probs(self, tokens: Tensor) -> Tensor:
        """log p(next token) (B, T, V) float32 of tokens (B, T): a normalised language model."""
        per_expert = self._expert_log_probs(tokens)
        return mix_log_probs(self._log_weights(tokens, per_expert), per_expert)

    @torch.no_grad()
    def log_weights(self, tokens: Tensor) -> Tensor:
        """Log weights (B, T, E): entry t mixes the prediction of token t + 1."""
        per_expert = self._expert_log_probs(tokens)
        return self._log_weights(tokens, per_expert)

    def _expert_log_probs(self, tokens: Tensor) -> Tensor:
        """(B, T, E, V) float32, every expert reading all of it."""
        log_probs = [self.expert(e)(tokens).float().log_softmax(-1) for e in range(self.n_experts)]
        return torch.stack(log_probs, dim=-2)

    def _log_weights(self, tokens: Tensor, per_expert: Tensor) -> Tensor:
        observed = tokens[:, 1:, None, None].expand(-1, -1, self.n_experts, 1)
        scores = per_expert[:, :-1].gather(-1, observed).squeeze(-1)
        # One more entry, for the prediction after the last token; no rule reads it.
        scores = torch.nn.functional.pad(scores, (0, 0, 0, 1))
        router_scores = scores
        if self.router is not None:
            read = self.router.token_scores(tokens)
            router_scores = torch.nn.functional.pad(read, (0, 0, 0, 1))
        return mixing_log_weights(self.settings, scores, router_scores)

    # Routing

    def route(self, tokens: Tensor) -> int | None:
        """The expert for one prompt (T,), read by the router alone; None while it is too short.

        Only `top1` with a router of its own settles on one expert; the others return None.
        """
        n_read = len(tokens) - 1
        if self.settings.mixing != "top1" or self.router is None:
            return None
        if n_read < self.settings.prefix_tokens:
            return None
        scores = self.router.token_scores(tokens[None])
        prices = inference_prices(self.settings)
        if prices is not None:
            prices = scaled_prices(prices, self.settings.prefix_tokens, reference_length=1)
        return int(route_prefix(scores, self.settings.prefix_tokens, prices=prices))

    # Changing the set of experts

    @property
    def loaders(self) -> tuple[ExpertLoader, ...]:
        """What loads each expert."""
        return tuple(self._loaders)

    def with_loaders(self, loaders: Sequence[ExpertLoader]) -> "Mixture":
        """The same rule over as many other experts."""
        return Mixture(self.settings, loaders, self.router, resident=self._resident)

    def with_expert(self, name: str, loader: ExpertLoader, counts: Tensor | None) -> "Mixture":
        """The mixture and one more expert; the others stay as they are.

        counts: (V,), its training tokens for the unigram router.
        """
        if name in self.settings.experts:
            raise CheckpointError(
                f"the mixture already has an expert `{name}`", hint="choose another name"
            )
        return self._changed(
            (*self.settings.experts, name),
            [*self._loaders, loader],
            self._router_of([*range(self.n_experts)], [counts]),
        )

    def without_expert(self, name: str) -> "Mixture":
        """The mixture less one expert."""
        kept = self._all_but(name)
        if not kept:
            raise CheckpointError("a mixture needs at least one expert", hint="add one first")
        return self._changed(
            tuple(self.settings.experts[e] for e in kept),
            [self._loaders[e] for e in kept],
            self._router_of(kept, []),
        )

    def replace_expert(self, name: str, loader: ExpertLoader, counts: Tensor | None) -> "Mixture":
        """Another expert under the same name (at the end of the list)."""
        kept = self._all_but(name)
        return self._changed(
            (*(self.settings.experts[e] for e in kept), name),
            [*(self._loaders[e] for e in kept), loader],
            self._router_of(kept, [counts]),
        )

    def _all_but(self, name: str) -> list[int]:
        kept = [e for e, other in enumerate(self.settings.experts) if other != name]
        if len(kept) == self.n_experts:
            raise CheckpointError(
                f"the mixture has no expert `{name}`",
                hint=f"it has {', '.join(self.settings.experts)}",
            )
        return kept

    def _router_of(self, kept: list[int], added: list[Tensor | None]) -> PrefixRouter | None:
        """The unigram router for the kept experts and those added, by their counts (V,)."""
        if self.router is None:
            return None
        if not isinstance(self.router, UnigramRouter):
            raise CheckpointError(
                "only mixtures routed by `unigram` or by the experts themselves can change",
                hint='mix again with `router = "unigram"`',
            )
        rows = self.router.counts[kept]
        for counts in added:
            if counts is None:
                raise CheckpointError("the new expert has no token counts", hint="pass `counts`")
            rows = torch.cat([rows, counts[None].to(rows)])
        return UnigramRouter(rows)

    def _changed(
        self, names: tuple[str, ...], loaders: list[ExpertLoader], router: PrefixRouter | None
    ) -> "Mixture":
        # Prices belong to one set of experts; the new set has none.
        settings = self.settings.model_copy(
            update={
                "experts": names,
                "prices": (),
                "top_k": min(self.settings.top_k, len(names)),
            }
        )
        return Mixture(settings, loaders, router, resident=self._resident)
