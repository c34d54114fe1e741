"""Join the trained experts: fit the router and the temperature, write `mixture/`."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pyper.checkpoint import Json
from pyper.errors import CheckpointError
from pyper.evaluate import fit_temperature, held_out_windows, score_held_out
from pyper.mixture import (
    ExpertSource,
    LMRouter,
    Mixture,
    MixtureSettings,
    PrefixRouter,
    UnigramRouter,
    save_mixture,
)
from pyper.nn import Transformer
from pyper.stages.assignment import ExpertData
from pyper.stages.context import Context
from pyper.stages.folder import is_complete
from pyper.stages.router_lm import train_router_models
from pyper.stages.start import Brought, brought_along
from pyper.stages.train import finished_result, load_trained

# Validation tokens per domain on which τ is fitted.
_FIT_TOKENS = 32_768


def mix(context: Context, assigned: ExpertData) -> Path:
    """Write the mixture of a run's experts, or keep the one that is there when it is current.

    Raises CheckpointError that names an expert which is not trained yet.
    """
    folders = _trained_folders(context, assigned)
    brought = brought_along(context.run)
    metadata = _metadata(context, assigned, folders, brought)
    target = context.folder.mixture
    if is_complete(target, metadata):
        return target
    router, router_models = _fit_router(context, assigned)
    settings = _settings(context, assigned, brought)
    if context.run.mixture.temperature == "auto":
        tau = _fitted_temperature(context, settings, folders, router)
        settings = settings.model_copy(update={"temperature": tau})
    save_mixture(
        target,
        settings,
        [ExpertSource(context.model, (f / "best").resolve()) for f in folders],
        context.tokenizer(),
        counts=assigned.counts if settings.router == "unigram" else None,
        router_models=router_models,
        metadata=metadata,
        chat_template=brought.chat_template,
    )
    return target


def _trained_folders(context: Context, assigned: ExpertData) -> list[Path]:
    folders = [context.folder.expert(i) for i in range(context.n_experts)]
    for index, folder in enumerate(folders):
        if finished_result(folder) is None:
            raise CheckpointError(
                f"expert {index} (`{assigned.names[index]}`) is not trained to its end",
                hint=f"`pyper train {context.folder.root} --only expert:{index}`",
            )
    return folders


def _metadata(
    context: Context, assigned: ExpertData, folders: Sequence[Path], brought: Brought
) -> dict[str, Json]:
    mixture = context.run.mixture
    metadata: dict[str, Json] = {
        "mixture": mixture.model_dump(mode="json"),
        "names": assigned.names,
        "checkpoints": [str((f / "best").resolve().name) for f in folders],
    }
    if context.run.train.start_from is not None:
        template = hashlib.sha256((brought.chat_template or "").encode()).hexdigest()
        metadata |= {"stop_ids": list(brought.stop_ids), "chat_template": template}
    return metadata


def _settings(context: Context, assigned: ExpertData, brought: Brought) -> MixtureSettings:
    mixture = context.run.mixture
    temperature = 0.1 if mixture.temperature == "auto" else mixture.temperature
    return MixtureSettings(
        experts=tuple(assigned.names),
        tokenizer_fingerprint=context.data.manifest.tokenizer_fingerprint,
        bos_id=context.model.bos_id,
        stop_ids=brought.stop_ids,
        seq_len=context.model.seq_len,
        mixing=mixture.mixing,
        router=mixture.router,
        prefix_tokens=mixture.prefix_tokens,
        window=mixture.window,
        temperature=temperature,
        top_k=mixture.top_k,
        prune=mixture.prune,
        prices=() if assigned.prices is None else tuple(assigned.prices.tolist()),
        price_scale=mixture.price_scale,
    )


def _fit_router(
    context: Context, assigned: ExpertData
) -> tuple[PrefixRouter | None, list[Transformer]]:
    kind = context.run.mixture.router
    if kind == "unigram":
        return UnigramRouter(assigned.counts), []
    if kind == "lm":
        models = train_router_models(context, assigned)
        return LMRouter(models), models
    return None, []


def _fitted_temperature(
    context: Context,
    settings: MixtureSettings,
    folders: Sequence[Path],
    router: PrefixRouter | None,
) -> float:
    """τ with the smallest posterior loss on validation."""
    loaders = [partial(load_trained, folder, context.device) for folder in folders]
    mixture = Mixture(settings, loaders, router, resident=1)
    held_out = held_out_windows(
        context.data.documents("valid"), context.run.data.seq_len, _FIT_TOKENS
    )
    with context.console.status("fitting the temperature"):
        return fit_temperature(score_held_out(mixture, held_out), settings.top_k)
