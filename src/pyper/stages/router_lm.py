"""`router = "lm"`: a tiny language model per expert reads the prefix."""

from pyper.nn import Transformer
from pyper.stages.assignment import ExpertData
from pyper.stages.context import Context
from pyper.stages.tiny_lm import train_tiny_lm


def train_router_models(context: Context, assigned: ExpertData) -> list[Transformer]:
    """One model per expert on its documents; those already trained are read."""
    return [
        train_tiny_lm(
            context.run,
            assigned.documents(context, "train", index),
            context.folder.router_model(index),
            name=name,
            device=context.device,
            console=context.console,
        )
        for index, name in enumerate(assigned.names)
    ]
