"""What a mixture is, beside its weights: saved as `mixture/config.json`."""

from typing import Literal

from pydantic import Field

from pyper.config.base import Section
from pyper.config.expert import MAX_SEQ_LEN
from pyper.config.mixture import Mixing, Router

Rule = Literal["top1", "posterior", "window"]


class MixtureSettings(Section):
    """How experts are mixed. All modes are causal: position t uses tokens before it only."""

    version: Literal[1] = 1
    experts: tuple[str, ...]
    """Names, in the order of the weights."""
    tokenizer_fingerprint: str
    bos_id: int
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a text beside `bos_id`: those of a model that came from elsewhere."""
    seq_len: int = Field(ge=1, le=MAX_SEQ_LEN)
    mixing: Mixing = "posterior"
    router: Router = "unigram"
    prefix_tokens: int = Field(default=32, ge=1)
    window: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.1, gt=0, le=1)
    """τ of the posterior w ∝ p^τ."""
    top_k: int = Field(default=2, ge=1)
    prune: float = Field(default=1e-3, ge=0, lt=0.5)
    prices: tuple[float, ...] = ()
    """Nats per token of each expert in the balanced assignment; empty where there were none."""
    price_scale: float = Field(default=0.0, ge=0, le=1)

    @property
    def n_experts(self) -> int:
        """E."""
        return len(self.experts)
