"""Parts of a model that keep their weights."""

from collections.abc import Sequence

from pyper.config.train import Part
from pyper.errors import ConfigError
from pyper.nn import Transformer


def freeze(model: Transformer, parts: Sequence[Part]) -> None:
    """Give the parameters of `parts` no gradients. Raises ConfigError when nothing is left."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "`train.freeze` leaves nothing to train", hint="take something out of the list"
        )


def part_of(name: str) -> Part:
    """The part that a parameter belongs to; norms inside attention are norms."""
    inner = name.split(".")
    if "router" in inner:
        return "router"
    if any(word.endswith("norm") for word in inner):
        return "norm"
    if inner[0] in ("embedding", "head"):
        return "embedding" if inner[0] == "embedding" else "head"
    return "attention" if {"attention", "qkv", "out"} & set(inner) else "feed_forward"
