"""One whole expert."""

import torch
from torch import Tensor, nn

from pyper.config import ExpertConfig
from pyper.errors import PromptError
from pyper.nn.attention import AttentionContext, document_mask
from pyper.nn.block import Block
from pyper.nn.documents import document_ids, positions
from pyper.nn.kv_cache import KVCache
from pyper.nn.norm import RMSNorm
from pyper.nn.rope import rotation


class Transformer(nn.Module):
    """Embedding → blocks → norm → head. Its logits at t depend on tokens ≤ t only."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
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
        self._check_length(tokens.shape[1])
        if self.config.attend_across_documents:
            cos, sin = self._rotation(torch.arange(tokens.shape[1], device=tokens.device))
            return self._run(tokens, AttentionContext(cos, sin, mask=None))
        bos_id = self.config.bos_id
        cos, sin = self._rotation(positions(tokens, bos_id))
        mask = document_mask(document_ids(tokens, bos_id))
        return self._run(tokens, AttentionContext(cos, sin, mask))

    def extend(self, tokens: Tensor, cache: KVCache, n_new: Tensor | None = None) -> Tensor:
        """Read tokens (B, T) after what the cache holds; final states (B, T, D).

        n_new: (B,), how many of the T are real (the rest is padding on the right); default all.
        The cache grows by `n_new`. What it holds counts as one document. Raises PromptError when
        it is too small.
        """
        T = tokens.shape[1]
        longest = int((cache.lengths + (T if n_new is None else n_new)).max())
        self._check_length(longest)
        if longest > cache.capacity:
            raise PromptError(
                f"the cache holds {cache.capacity} tokens, {longest} are needed",
                hint="allocate a larger one",
            )
        where = cache.lengths[:, None] + torch.arange(T, device=tokens.device)
        where = where.clamp(max=cache.capacity)
        n_keys = min(int(cache.lengths.max()) + T, cache.capacity + 1)
        keys = torch.arange(n_keys, device=tokens.device)
        mask = (keys <= where[..., None])[:, None]
        cos, sin = self._rotation(where)
        context = AttentionContext(cos, sin, mask, where, cache, n_keys)
        states = self._run(tokens, context)
        cache.lengths = cache.lengths + (T if n_new is None else n_new)
        return states

    def _run(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, context, layer)
        states: Tensor = self.norm(x)
        return states

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
