"""Whether models can become one: the same shape, the same tokens."""

from collections.abc import Sequence
from typing import Any

from pyper.config import ExpertConfig
from pyper.errors import CheckpointError, ConfigError, PyperError, TokenizerError
from pyper.nn import Transformer

_TOKENS = ("vocab_size", "bos_id")
# How the first weights were drawn says nothing of the trained ones.
_IGNORED = {"init", "init_std"}


def check_mergeable(experts: Sequence[Transformer]) -> ExpertConfig:
    """The configuration that all of them share.

    Raises ConfigError for none or for one that is not dense, TokenizerError where `vocab_size` or
    `bos_id` differ, CheckpointError where anything else of the shape does.
    """
    if not experts:
        raise ConfigError("there are no experts to merge", hint="train at least two")
    for number, expert in enumerate(experts):
        if expert.config.kind != "dense":
            raise ConfigError(
                f'expert {number} is `kind = "{expert.config.kind}"`: only dense experts merge',
                hint="merge the dense experts that it was made of, or `add_expert` to it",
            )
    for number, expert in enumerate(experts[1:], start=1):
        if difference := _difference(experts[0].config, expert.config):
            raise _refusal(number, *difference)
    return experts[0].config


def check_fits(dense: Transformer, merged: Transformer) -> None:
    """Raises as `check_mergeable` does unless `dense` is an expert of the shape of `merged`."""
    if merged.config.kind != "sparse":
        raise ConfigError(
            f'experts are added to sparse models, not to `kind = "{merged.config.kind}"`',
            hint="merge dense experts first",
        )
    check_mergeable([dense])
    if difference := _difference(merged.config.as_dense(), dense.config):
        raise _refusal(merged.config.routing.n_experts, *difference)


def _difference(first: ExpertConfig, other: ExpertConfig) -> tuple[str, Any, Any] | None:
    """The first key that differs (those of the tokenizer before others), and both values."""
    ours, theirs = (_shape(config) for config in (first, other))
    for key in sorted(ours, key=lambda key: key not in _TOKENS):
        if ours[key] != theirs[key]:
            return key, ours[key], theirs[key]
    return None


def _shape(config: ExpertConfig) -> dict[str, Any]:
    """As computed: a default that is written out is no difference."""
    resolved = {"n_kv_heads": config.kv_heads, "head_dim": config.dim_per_head}
    return config.model_dump(exclude=_IGNORED) | resolved | {"d_ff": config.ff_dim}


def _refusal(number: int, key: str, first: Any, other: Any) -> PyperError:
    message = f"the experts do not fit together: `{key}` is {first} in the first, {other} in "
    message += f"expert {number}"
    if key in _TOKENS:
        hint = "train all experts on data prepared with one tokenizer"
        return TokenizerError(message, hint=hint)
    return CheckpointError(message, hint="branch all experts from one seed, with one `[model]`")
