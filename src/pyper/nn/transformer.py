"""One whole expert."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.errors import PromptError
from pyper.nn.attention import AttentionContext, document_mask
from pyper.nn.block import Block
from pyper.nn.documents import document_ids, positions
from pyper.nn.expert_stack import ExpertStack
from pyper.nn.kv_cache import CachePass, KVCache
from pyper.nn.norm import RMSNorm
from pyper.nn.recompute import run_recomputed
from pyper.nn.rope import rotation
from pyper.nn.router_state import RouterState
from pyper.nn.sparse_feed_forward import Routed, Rule


@dataclass(frozen=True)
class Reading:
    """What a forward pass gives."""

    states: Tensor
    """(B, T, D), normalised: what the head reads."""
    routed: tuple[Routed, ...] = ()
    """Of the sparse layers, in order."""


class Transformer(nn.Module):
    """Embedding → blocks → norm → head. Its logits at t depend on tokens ≤ t only."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = 0
        """So many blocks, from the first on, keep no activations for the backward pass."""
        self._compiled: list[Any] = []
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        mixed = config.kind == "token_mixture"
        n_blocks = config.routing.stem_layers if mixed else config.n_layers
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(n_blocks))
        self.experts = ExpertStack(config) if mixed else None
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embedding.weight.dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T). Raises PromptError when T exceeds the context."""
        logits: Tensor = self.head(self.hidden(tokens))
        return logits

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final states (B, T, D), normalised: what the head reads."""
        return self.read(tokens).states

    def read(
        self, tokens: Tensor, *, rule: Rule | None = None, padding: Tensor | None = None
    ) -> Reading:
        """Final states of tokens (B, T), and what routing did.

        rule: how sparse layers choose (None: as training or evaluation does; only that is causal).
        padding: (B, T), True where there is no token; on the right, since attention is causal.
        """
        context = self.attention_context(tokens, rule=rule, padding=padding)
        return self._run(self.embedding(tokens), context)

    def attention_context(
        self, tokens: Tensor, *, rule: Rule | None = None, padding: Tensor | None = None
    ) -> AttentionContext:
        """What all layers share when they read tokens (B, T). Raises PromptError as `forward`."""
        self._check_length(tokens.shape[1])
        if self.config.attend_across_documents:
            cos, sin = self._rotation(torch.arange(tokens.shape[1], device=tokens.device))
            mask = None
        else:
            bos_id = self.config.bos_id
            cos, sin = self._rotation(positions(tokens, bos_id))
            mask = document_mask(document_ids(tokens, bos_id))
        return AttentionContext(cos, sin, mask, rule=rule, padding=padding)

    @property
    def compiles_blocks(self) -> bool:
        """Whether `compile_blocks` was asked for."""
        return bool(self._compiled)

    def compile_blocks(self) -> None:
        """Compile the blocks for training. Evaluation goes without: its many shapes would compile
        them again and again."""
        self._compiled = [torch.compile(block) for block in self.blocks]

    def begin_step(self, trained_share: float) -> None:
        """Before each optimizer step: the share of all steps that are done (0 … 1)."""
        for state in self._router_states():
            state.begin_step(trained_share)

    def end_step(self) -> None:
        """After each optimizer step: routing thresholds and biases take in what was observed."""
        for state in self._router_states():
            state.end_step()

    @property
    def has_thresholds(self) -> bool:
        """Whether experts choose tokens, so that thresholds decide after training."""
        return any(state.sparse.is_expert_choice for state in self._router_states())

    @torch.no_grad()
    def calibrate_thresholds(self, tokens: Tensor) -> None:
        """Set all thresholds to the k-th scores of one pool, tokens (B, T), front to back.

        They fit the weights as they are, and a pool as large as memory allows; the moving average
        of training is of past weights, and of smaller pools, whose mean k-th score lies too high.
        Later layers read what the layers before them let through by then. The pool should hold text
        in the proportions in which it will come, 8 k tokens at least: C − 1 of them pass (the k-th
        itself does not). Raises DataError where it gives an expert no token.
        """
        was_training = self.training
        self.eval()
        self.read(tokens, rule="calibrate")
        self.train(was_training)

    def training_rules(self) -> tuple[str, ...]:
        """How experts of each routed layer choose in training now: it changes during training."""
        return tuple(state.rule(training=True) for state in self._router_states())

    def has_fixed_shapes(self, n_tokens: int) -> bool:
        """Whether a training pass over so many launches the same kernels whatever they are."""
        states = self._router_states()
        return all(state.has_fixed_shapes(self.dtype, n_tokens) for state in states)

    def _router_states(self) -> Iterator[RouterState]:
        return (module for module in self.modules() if isinstance(module, RouterState))

    def extend(self, tokens: Tensor, cache: KVCache, n_new: Tensor | None = None) -> Tensor:
        """Read tokens (B, T) after what the cache holds; final states (B, T, D).

        n_new: (B,), how many of the T are real (the rest is padding on the right); default all.
        The cache grows by `n_new`. What it holds counts as one document. Raises PromptError when
        it is too small.
        """
        B, T = tokens.shape
        n_new = torch.full((B,), T) if n_new is None else n_new.cpu()
        longest = int((cache.lengths + n_new).max())
        self._check_length(longest)
        if longest > cache.capacity:
            raise PromptError(
                f"the cache holds {cache.capacity} tokens, {longest} are needed",
                hint="allocate a larger one",
            )
        real = (torch.arange(T) < n_new[:, None]).to(tokens.device)
        states = tokens.new_zeros(B, T, self.config.d_model, dtype=self.dtype)
        if n_new.any():
            states[real] = self.read_cached(tokens[real], cache.plan(n_new))
        cache.lengths = cache.lengths + n_new
        return states

    def read_cached(self, tokens: Tensor, cached: CachePass) -> Tensor:
        """Final states (n, D) of the n tokens (n,) that the pass was planned for.

        They are read in whole tiles, so that a token's states do not depend on the others'.
        """
        n = len(tokens)
        x = F.pad(self.embedding(tokens), (0, 0, 0, len(cached.positions) - n))
        cos, sin = self._rotation(cached.positions)
        context = AttentionContext(cos, sin, None, cached, padding=cached.padding)
        return self._run(x[None], context).states[0, :n]

    def _run(self, x: Tensor, context: AttentionContext) -> Reading:
        routed = []
        blocks = self._compiled if self._compiled and self.training else self.blocks
        for layer, block in enumerate(blocks):
            if layer < self.recompute_blocks and self.training and torch.is_grad_enabled():
                x, layer_routed = run_recomputed(block, x, context, layer)
            else:
                x, layer_routed = block(x, context, layer)
            if layer_routed is not None:
                routed.append(layer_routed)
        if self.experts is not None:
            x, stack_routed = self.experts(x, context)
            routed.append(stack_routed)
        return Reading(self.norm(x), tuple(routed))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for all heads: (T, 1, K), or (B, T, 1, K)."""
        c = self.config
        cos, sin = rotation(positions, c.dim_per_head, c.rope_theta, c.rope_scaling)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def _check_length(self, length: int) -> None:
        limit = self.config.seq_len
        if limit and length > limit:
            raise PromptError(
                f"{length} tokens do not fit the context of {limit}",
                hint="shorten the prompt, ask for fewer new tokens, or extend with `rope_scaling`",
            )
