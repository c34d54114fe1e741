"""Tiny language models, one per expert: routers, and the scores of a finer domain discovery."""

from pyper.config import ExpertConfig, TrainConfig
from pyper.nn import Transformer, init_weights
from pyper.stages.assign import ExpertData
from pyper.stages.context import Context
from pyper.stages.train import load_trained
from pyper.train import TrainingData, TrainPlan, train_expert
from pyper.train.schedule import branch_schedule

# About a hundredth of an expert: routing quality hardly depends on it (arXiv:2410.03529, fig. 4).
_D_MODEL, _N_LAYERS, _N_HEADS = 64, 2, 4
_STEPS, _BATCH = 300, 16


def router_config(context: Context) -> ExpertConfig:
    """The shape of a router model."""
    return ExpertConfig(
        vocab_size=context.model.vocab_size,
        bos_id=context.model.bos_id,
        seq_len=context.model.seq_len,
        d_model=_D_MODEL,
        n_layers=_N_LAYERS,
        n_heads=_N_HEADS,
        qk_norm=True,
        tie_embeddings=False,
    )


def train_router_models(context: Context, assigned: ExpertData) -> list[Transformer]:
    """One model per expert on its documents; those already trained are read."""
    models = []
    for index in range(context.n_experts):
        folder = context.folder.router_model(index)
        if not (folder / "best").exists():
            data = TrainingData(
                assigned.documents(context, "train", index),
                context.data.documents("valid"),
                context.run.data.seq_len,
            )
            _train(context, data, index, f"router {assigned.names[index]}")
        models.append(load_trained(folder, context.device))
    return models


def _train(context: Context, data: TrainingData, index: int, name: str) -> Transformer:
    config = TrainConfig(
        steps=_STEPS,
        global_batch_tokens=_BATCH * data.seq_len,
        learning_rate=3e-3,
        optimizer="muon",
        eval_every=_STEPS,
        eval_tokens=data.seq_len,
    )
    model = Transformer(router_config(context))
    init_weights(model, context.run.run.random_seed)
    model.to(context.device)
    plan = TrainPlan(
        name, _STEPS, branch_schedule(config, _STEPS, warm=False), 3e-3, random_seed=index
    )
    with context.console.status(f"training the {name}"):
        train_expert(model, data, config, plan, context.folder.router_model(index))
    return model
