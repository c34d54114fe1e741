"""`[model]`: the shape of one expert."""

from typing import Literal

from pydantic import Field, model_validator

from pyper.config.base import Section
from pyper.config.sparse import SparseConfig
from pyper.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "swiglu", "relu2"]
Init = Literal["scaled_normal", "zero_output"]
Kind = Literal["dense", "sparse", "token_mixture"]


class RopeScaling(Section):
    """How RoPE reaches beyond the length it was trained on."""

    kind: Literal["linear", "ntk", "yarn"]
    factor: float = Field(gt=1.0)
    """New length divided by the original one."""
    original_seq_len: int = Field(default=2048, gt=0)
    """The length the weights were trained on (used by YaRN)."""


class ExpertConfig(Section):
    """One expert: a decoder-only transformer, saved as `config.json` beside its weights."""

    kind: Kind = "dense"
    """`sparse`: feed-forwards are experts of each layer; `token_mixture`: whole transformers, each
    of which chooses its tokens. Both are set up in `[model.sparse]`."""
    sparse: SparseConfig | None = None
    vocab_size: int = Field(default=0, ge=0)
    """0 takes the size of the data's tokenizer."""
    seq_len: int = Field(default=0, ge=0)
    """Longest context in tokens; 0 takes `[data] seq_len`."""
    bos_id: int = Field(default=-1, ge=-1)
    """The token that begins every document; -1 takes the tokenizer's."""
    attend_across_documents: bool = True
    """False: a token attends only inside its own document, and positions restart there."""
    d_model: int = Field(default=512, gt=0)
    n_layers: int = Field(default=8, gt=0)
    n_heads: int = Field(default=8, gt=0)
    n_kv_heads: int | None = Field(default=None, gt=0)
    """Fewer than `n_heads` is grouped-query attention; default: as many as `n_heads`."""
    head_dim: int | None = Field(default=None, gt=0)
    """Default: `d_model / n_heads`."""
    d_ff: int | None = Field(default=None, gt=0)
    """Default: `4 · d_model`."""
    activation: Activation = "gelu"
    """`gelu` is the exact (erf) one, `gelu_tanh` its approximation."""
    qk_norm: bool = False
    """RMSNorm over `head_dim` on queries and keys before RoPE."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    feed_forward_bias: bool = False
    tie_embeddings: bool = False
    """One matrix for the input table and the output head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-6, gt=0)
    init: Init = "scaled_normal"
    """`scaled_normal`: N(0, init_std), output projections divided by √(2·n_layers) as in GPT-2;
    `zero_output`: N(0, 1/√fan_in), output projections zero, so that every block starts as the
    identity."""
    init_std: float = Field(default=0.02, gt=0)

    @model_validator(mode="after")
    def _sparse_goes_with_its_kind(self) -> "ExpertConfig":
        if self.kind == "dense" and self.sparse is not None:
            raise ConfigError(
                '`[model.sparse]` has no effect with `model.kind = "dense"`',
                hint='set `kind = "sparse"` in `[model]`, or leave `[model.sparse]` out',
            )
        if self.kind == "token_mixture" and self.routing.stem_layers >= self.n_layers:
            raise ConfigError(
                f"`model.sparse.stem_layers` ({self.routing.stem_layers}) leaves none of "
                f"`model.n_layers` ({self.n_layers}) for the experts",
                hint="lower `stem_layers`, or raise `n_layers`",
            )
        if self.kind == "token_mixture" and self.routing.routing not in (
            "expert_choice",
            "threshold",
        ):
            raise ConfigError(
                f'`model.sparse.routing = "{self.routing.routing}"` does not go with '
                '`kind = "token_mixture"`: its experts choose tokens',
                hint='use `routing = "expert_choice"`',
            )
        if self.kind == "token_mixture" and self.routing.attention_experts:
            raise ConfigError(
                '`model.sparse.attention_experts` does not go with `kind = "token_mixture"`: its '
                "experts have attentions of their own",
                hint='leave it out, or set `kind = "sparse"`',
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> "ExpertConfig":
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"`model.d_model` ({self.d_model}) is not a multiple of "
                f"`model.n_heads` ({self.n_heads})",
                hint="change one of them, or set `head_dim`",
            )
        if self.n_heads % self.kv_heads:
            raise ConfigError(
                f"`model.n_kv_heads` ({self.kv_heads}) must divide `n_heads` ({self.n_heads})",
                hint="one key/value head for every 1, 2, 4 … query heads",
            )
        if self.dim_per_head % 2:
            raise ConfigError(
                f"RoPE needs an even `head_dim`, not {self.dim_per_head}",
                hint="change `d_model`, `n_heads` or `head_dim`",
            )
        if self.dim_per_head == 2 and self.rope_scaling and self.rope_scaling.kind == "ntk":
            raise ConfigError(
                "NTK scaling raises the base to the power K/(K − 2): `head_dim` 2 has none",
                hint='use more dimensions per head, or `rope_scaling = { kind = "linear", … }`',
            )
        if self.rope_theta <= 1 and self.rope_scaling and self.rope_scaling.kind == "yarn":
            raise ConfigError(
                f"YaRN needs a `rope_theta` above 1, not {self.rope_theta:g}",
                hint="`10_000` is usual",
            )
        return self

    @property
    def routing(self) -> SparseConfig:
        """`[model.sparse]`, or its defaults."""
        return self.sparse or SparseConfig()

    def has_sparse_feed_forward(self, layer: int) -> bool:
        """Whether the feed-forward of block `layer` (from 0) is sparse."""
        return self.kind == "sparse" and (layer + 1) % self.routing.every == 0

    @property
    def attention_experts(self) -> int:
        """How many attentions a layer mixes; 0: it has one, without gates."""
        return self.routing.attention_experts if self.kind == "sparse" else 0

    def as_dense(self) -> "ExpertConfig":
        """The dense model of the same shape: the control of a sparse one."""
        return self.model_copy(update={"kind": "dense", "sparse": None})

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def dim_per_head(self) -> int:
        """K, the width of one head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def ff_dim(self) -> int:
        """F, the width inside the feed-forward network."""
        return self.d_ff or 4 * self.d_model
