"""Whole language models, mixed token by token into one, trained by Pyper, for `transformers`.

The weights of the experts follow from how well each predicted the text so far, never from later
tokens: the logits are log-probabilities of a causal language model. Shapes: B batch, T new tokens,
V vocabulary, E experts.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_pyper_mixture import PyperMixtureConfig
from .pyper_generation import OwnCacheGenerationMixin, TextMemory
from .pyper_layers import Decoder, History, KeyValues


class Reader:
    """One decoder's memory of the texts: keys, values, and what it expects next."""

    def __init__(self) -> None:
        self.cache = KeyValues()
        self.last: Tensor | None = None  # (B, V), log-probabilities of the next token

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.last = None if self.last is None else self.last[rows.to(self.last.device)]


class MixtureCache(TextMemory):
    """What the experts and the router remember of the texts, and what is known of the experts."""

    def __init__(self, n_experts: int, n_routers: int) -> None:
        super().__init__()
        self.experts = [Reader() for _ in range(n_experts)]
        self.routers = [Reader() for _ in range(n_routers)]
        self.evidence: Tensor | None = None  # (B, E) float64, tempered log-likelihoods
        self.routed: Tensor | None = None  # (B, E) float64, the router's scores of the prefix
        self.live: Tensor | None = None  # (B, E), experts that may still be needed

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for reader in (*self.experts, *self.routers):
            reader.select(beam_idx)
        self.evidence, self.live = self.evidence[beam_idx], self.live[beam_idx]
        self.routed = None if self.routed is None else self.routed[beam_idx]


class UnigramRouter(nn.Module):
    """Log-frequencies (E, V) of the tokens in each expert's training text, always float32."""

    def __init__(self, n_experts: int, vocab_size: int) -> None:
        super().__init__()
        self.log_probs = nn.Parameter(torch.zeros(n_experts, vocab_size), requires_grad=False)


class PyperMixtureForCausalLM(PreTrainedModel, OwnCacheGenerationMixin):
    """E experts and a router as one causal language model."""

    config_class = PyperMixtureConfig
    _keep_in_fp32_modules_strict: ClassVar = {"state", "unigram"}

    def __init__(self, config: PyperMixtureConfig) -> None:
        super().__init__(config)
        if config.mixing not in ("posterior", "top1"):
            raise ValueError(f"`mixing` must be `posterior` or `top1`, not `{config.mixing}`")
        self.experts = nn.ModuleList(Decoder(shape) for shape in config.experts)
        self.router_models = nn.ModuleList(Decoder(shape) for shape in config.router_models)
        self.unigram = None
        if config.router == "unigram":
            self.unigram = UnigramRouter(len(self.experts), config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MixtureCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        cache: MixtureCache | None = None,
    ) -> CausalLMOutputWithPast:
        """log p(next token), (B, T, V) float32, of input_ids (B, T), which follow what the cache
        holds.

        Each row is one text; padding (on either side) is where the attention mask is 0. With a
        cache, experts that have become unlikely are dropped after the last token, for good.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = MixtureCache(len(self.experts), len(self.router_models))
        history = History.of(input_ids, attention_mask, cache and cache.history)
        log_probs, scores = self._read(history, input_ids, cache, logits_to_keep)
        log_weights = self._log_weights(history, scores, cache)[:, -logits_to_keep:]
        if cache is not None:
            cache.history = history
        wide = log_weights.to(log_probs[0])  # (B, T, E)
        logits = torch.logsumexp(wide[..., None] + torch.stack(log_probs, dim=2), dim=2)
        return self.output(logits, labels, cache, return_dict)

    def _read(self, history, tokens, cache, n_keep) -> tuple[list[Tensor], Tensor]:
        """Every expert's log-probabilities (B, T, V) of the next tokens, the last `n_keep` of them
        (0: all); and of the tokens themselves, (B, T, E). Zeros of experts that no row needs."""
        log_probs, scores = [], []
        for number, expert in enumerate(self.experts):
            reader = None if cache is None else cache.experts[number]
            if cache is not None and cache.live is not None and not cache.live[:, number].any():
                cache.experts[number] = Reader()  # its keys and values are not needed any more
                n_positions = n_keep or tokens.shape[1]
                log_probs.append(torch.zeros(len(tokens), n_positions, self.config.vocab_size))
                scores.append(torch.zeros(tokens.shape))
                continue
            said, score = _read_one(expert, reader, history, tokens)
            log_probs.append(said[:, -n_keep:])
            scores.append(score)
        device = tokens.device
        return [x.to(device) for x in log_probs], torch.stack([x.to(device) for x in scores], -1)

    def _log_weights(self, history: History, scores: Tensor, cache) -> Tensor:
        """Log weights (B, T, E): entry t mixes the prediction that follows token t."""
        evidence = self._evidence(history, scores, cache)
        log_weights = evidence.log_softmax(-1)
        if self.config.mixing == "top1":
            return self._one_expert(history, scores, log_weights, cache)
        if cache is not None:
            cache.live = _likely(log_weights[:, -1], self.config.mixing_prune)
            dropped = torch.zeros_like(log_weights, dtype=torch.bool)
            dropped[:, -1] = ~cache.live
            log_weights = log_weights.masked_fill(dropped, -math.inf).log_softmax(-1)
        return _keep_top_k(log_weights, self.config.mixing_top_k)

    def _evidence(self, history: History, scores: Tensor, cache) -> Tensor:
        """(B, T, E), what every expert's predictions speak for it, by the end of each token."""
        T = scores.shape[1]
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        # The first token of a text is given, not predicted: nobody is judged by it.
        judged = (history.real & (history.position > 0))[:, -T:, None]
        evidence = (self.config.mixing_temperature * scores.to(wide) * judged).cumsum(1)
        if cache is None:
            return evidence
        if cache.evidence is not None:
            evidence = evidence + cache.evidence[:, None]
            evidence = evidence.masked_fill(~cache.live[:, None], -math.inf)
        cache.evidence = evidence[:, -1]
        return evidence

    def _one_expert(self, history: History, scores: Tensor, log_weights: Tensor, cache) -> Tensor:
        """The router's choice where the prefix has been read; before that, log_weights."""
        routed = self._routed(history, scores, cache)
        if self.config.prices is not None:
            prices = torch.tensor(self.config.prices, dtype=routed.dtype, device=routed.device)
            routed = routed - self.config.prefix_tokens * prices
        chosen = F.one_hot(routed.argmax(-1), len(self.experts)).bool()
        is_settled = history.position[:, -scores.shape[1] :, None] >= self.config.prefix_tokens
        if cache is not None:
            cache.live = chosen | ~is_settled[:, -1]
        settled = torch.zeros_like(routed).masked_fill(~chosen, -math.inf)
        return torch.where(is_settled, settled[:, None], log_weights)

    def _routed(self, history: History, scores: Tensor, cache) -> Tensor:
        """The router's scores of the prefix, as far as it was read, (B, E)."""
        T, prefix = scores.shape[1], self.config.prefix_tokens
        tokens, position = history.tokens[:, -T:], history.position[:, -T:]
        if cache is not None and cache.routed is not None and (position > prefix).all():
            return cache.routed
        if self.unigram is not None:
            scores = self.unigram.log_probs.T[tokens]
        elif len(self.router_models) > 0:
            readers = [None] * len(self.router_models) if cache is None else cache.routers
            pairs = zip(self.router_models, readers, strict=True)
            read = [_read_one(model, reader, history, tokens)[1] for model, reader in pairs]
            scores = torch.stack([x.to(tokens.device) for x in read], -1)
        counts = history.real[:, -T:] & (position > 0) & (position <= prefix)
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        routed = (scores.to(wide) * counts[..., None]).sum(1)
        if cache is not None:
            routed = routed if cache.routed is None else cache.routed + routed
            cache.routed = routed
        return routed

    def get_input_embeddings(self):
        return self.experts[0].embedding


def _read_one(
    model: Decoder, reader: Reader | None, history: History, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """log p of the next tokens (B, T, V) and of the tokens themselves (B, T), both float32; zero
    for a first token, which nothing predicts."""
    states = model.states(history, tokens.shape[1], reader and reader.cache)
    said = model.logits(states).float().log_softmax(-1)
    if reader is None or reader.last is None:
        first = torch.zeros_like(said[:, 0, :1])
    else:
        first = reader.last.gather(1, tokens[:, :1].to(said.device))
    later = said[:, :-1].gather(2, tokens[:, 1:, None].to(said.device)).squeeze(2)
    if reader is not None:
        reader.last = said[:, -1]
    return said, torch.cat([first, later], dim=1)


def _likely(log_weights: Tensor, prune: float) -> Tensor:
    """(B, E): experts whose weight is not below `prune`; the best always stays."""
    n_experts = log_weights.shape[-1]
    best = F.one_hot(log_weights.argmax(-1), n_experts).bool()
    # Half of an equal share is no evidence against an expert.
    return (log_weights.exp() >= min(prune, 0.5 / n_experts)) & log_weights.isfinite() | best


def _keep_top_k(log_weights: Tensor, k: int) -> Tensor:
    """The k largest of (..., E), renormalised; of equals the first ones."""
    order = log_weights.argsort(dim=-1, descending=True, stable=True)
    dropped = torch.zeros_like(log_weights, dtype=torch.bool).scatter(-1, order[..., k:], True)
    return log_weights.masked_fill(dropped, -math.inf).log_softmax(-1)
