"""`[model]`: the shape of one expert."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pyper.config.base import Section
from pyper.config.sparse import SparseConfig
from pyper.errors import ConfigError

Activation = Literal["gelu", "gelu_tanh", "swiglu", "relu2"]
Init = Literal["scaled_normal", "zero_output"]
Kind = Literal["dense", "sparse", "token_mixture"]
MAX_SEQ_LEN = 1 << 30
"""A hundred times the longest context in use."""
_NOT_IN_TOKEN_MIXTURES = (
    "qk_norm_over",
    "norm_position",
    "attention_output_bias",
    "no_rope_layers",
)


# Which optional keys each kind of scaling reads.
SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "ntk": (),
    "yarn": (
        "original_seq_len",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("original_seq_len", "low_freq_factor", "high_freq_factor"),
}


class RopeScaling(Section):
    """How RoPE reaches beyond the length it was trained on."""

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    """`llama3` is that of Llama 3.1: only slow pairs are interpolated."""
    factor: float = Field(ge=1.0)
    """New length divided by the original one."""
    original_seq_len: int = Field(default=2048, gt=0)
    """The length the weights were trained on (used by YaRN and `llama3`)."""
    beta_fast: float = Field(default=32.0, gt=0)
    """YaRN: pairs that turn more often in the original length keep their speed."""
    beta_slow: float = Field(default=1.0, gt=0)
    """YaRN: pairs that turn less often in the original length are interpolated."""
    attention_factor: float | None = Field(default=None, gt=0)
    """YaRN: factor on cos and sin; default: from `factor`, `mscale` and `mscale_all_dim`."""
    mscale: float | None = Field(default=None, gt=0)
    """YaRN, with `mscale_all_dim`: the factor is (0.1·mscale·ln s + 1) / (0.1·mscale_all_dim·ln s
    + 1) instead of 0.1·ln s + 1."""
    mscale_all_dim: float | None = Field(default=None, gt=0)
    truncate: bool = True
    """YaRN: round the borders between the pairs to whole pairs."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: pairs with fewer turns than this in the original length are interpolated."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: pairs with more turns than this keep their speed."""

    @field_validator("kind", mode="before")
    @classmethod
    def _no_dynamic_scaling(cls, kind: object) -> object:
        if kind == "dynamic":
            raise ConfigError(
                '`rope_scaling.kind = "dynamic"` turns keys anew at every length: cached ones '
                "would be wrong, and predictions would depend on later tokens",
                hint='use `kind = "ntk"` with the factor of the longest text, or `"yarn"`',
            )
        return kind

    @model_validator(mode="after")
    def _keys_go_with_the_kind(self) -> "RopeScaling":
        known = {"kind", "factor", "original_seq_len", *SCALING_KEYS[self.kind]}
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for key in self.model_fields_set - known:
            if getattr(self, key) != defaults[key]:
                raise ConfigError(
                    f'`rope_scaling.{key}` has no effect with `kind = "{self.kind}"`',
                    hint="leave it out",
                )
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if getattr(self, low) >= getattr(self, high):
                raise ConfigError(
                    f"`rope_scaling.{low}` ({getattr(self, low):g}) must be below "
                    f"`{high}` ({getattr(self, high):g})",
                    hint=f"usual: {defaults[low]:g} and {defaults[high]:g}",
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ConfigError(
                "`rope_scaling.mscale` and `mscale_all_dim` go together",
                hint="set both or neither",
            )
        return self


class ExpertConfig(Section):
    """One expert: a decoder-only transformer, saved as `config.json` beside its weights."""

    kind: Kind = "dense"
    """`sparse`: feed-forwards are experts of each layer; `token_mixture`: whole transformers, each
    of which chooses its tokens. Both are set up in `[model.sparse]`."""
    sparse: SparseConfig | None = None
    vocab_size: int = Field(default=0, ge=0)
    """0 takes the size of the data's tokenizer."""
    seq_len: int = Field(default=0, ge=0, le=MAX_SEQ_LEN)
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
    """RMSNorm on queries and keys before RoPE."""
    qk_norm_over: Literal["head", "projection"] = "head"
    """What `qk_norm` takes the mean over: each head (Qwen 3), or all heads of a token (OLMo 2)."""
    norm_position: Literal["pre", "post"] = "pre"
    """`pre`: x + f(norm(x)); `post`: x + norm(f(x)), as in OLMo 2."""
    attention_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """A bias on the projection that attention writes with."""
    feed_forward_bias: bool = False
    """Biases on all projections of the feed-forward."""
    no_rope_layers: tuple[int, ...] = ()
    """Layers (from 0) whose attention does not see positions, as in SmolLM 3."""
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
    def _blocks_are_possible(self) -> "ExpertConfig":
        if self.qk_norm_over == "projection" and not self.qk_norm:
            raise ConfigError(
                '`model.qk_norm_over = "projection"` has no effect without `qk_norm`',
                hint="set `qk_norm = true`, or leave `qk_norm_over` out",
            )
        if self.norm_position == "post" and self.init == "zero_output":
            raise ConfigError(
                '`model.norm_position = "post"` normalises what a block writes: outputs that begin '
                'at zero (`init = "zero_output"`) would get gradients of any size',
                hint='use `init = "scaled_normal"`',
            )
        layers = self.no_rope_layers
        if list(layers) != sorted(set(layers)):
            raise ConfigError(
                f"`model.no_rope_layers` must ascend, each layer once, not {list(layers)}",
                hint="for every fourth of eight layers: `[3, 7]`",
            )
        if layers and not 0 <= layers[0] <= layers[-1] < self.n_layers:
            raise ConfigError(
                f"`model.no_rope_layers` must be in 0 … {self.n_layers - 1}, not {list(layers)}",
                hint="layers count from 0",
            )
        return self

    @model_validator(mode="after")
    def _token_mixtures_are_plain(self) -> "ExpertConfig":
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for key in _NOT_IN_TOKEN_MIXTURES if self.kind == "token_mixture" else ():
            if getattr(self, key) != defaults[key]:
                raise ConfigError(
                    f"`model.{key} = {getattr(self, key)!r}` does not go with `kind = "
                    '"token_mixture"`, whose experts run as one batch of plain blocks',
                    hint=f'leave `{key}` out, or set `kind = "sparse"`',
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
