"""Decide which document belongs to which expert."""

from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyper.checkpoint import (
    Json,
    read_tensors,
    write_folder_atomically,
    write_tensors,
)
from pyper.checkpoint import write_json_atomically as write_json
from pyper.data import SPLITS, Documents, Split
from pyper.errors import ConfigError, DataError
from pyper.mixture import assign_documents, discover_unigram
from pyper.nn import Transformer
from pyper.routing import apply_prices, assign_with_prices
from pyper.stages.assignment import ExpertData, read_assignment
from pyper.stages.context import Context
from pyper.stages.folder import is_complete
from pyper.stages.tiny_lm import document_scores, train_tiny_lm

# EM converges in few rounds from the unigram domains (arXiv:2410.03529 makes 94 from noise).
_LM_ROUNDS = 2


def assign(context: Context) -> ExpertData:
    """Divide the documents, or read how they were divided before.

    Raises DataError, and ConfigError for an `[[expert]]` that is none of those found.
    """
    target, metadata = context.folder.assignment, _metadata(context)
    if not is_complete(target, metadata):
        if context.n_experts == 1:
            _write(context, _all_to_one(context), None, metadata)
        elif context.run.mixture.assign == "folder":
            _write(context, _by_folder(context), None, metadata)
        else:
            _write(context, *_discover(context), metadata)
    assigned = read_assignment(target)
    _refuse_strangers(context, assigned.names)
    return assigned


def _refuse_strangers(context: Context, names: list[str]) -> None:
    """Settings for nobody would be dropped without a word."""
    for override in context.run.expert:
        known = override.name in names if override.index is None else override.index < len(names)
        if not known:
            which = override.index if override.name is None else override.name
            raise ConfigError(
                f"`[[expert]]` {which} is none of this run's experts",
                hint=f"they are {', '.join(f'{i} {name}' for i, name in enumerate(names))}",
            )


def _metadata(context: Context) -> dict[str, Json]:
    mixture = context.run.mixture
    return {
        "data": context.data.manifest.fingerprint,
        "n_experts": mixture.n_experts,
        "assign": mixture.assign,
        "scores": mixture.discover_scores,
        "rounds": mixture.discover_rounds,
        "random_seed": context.run.run.random_seed,
        "names": [[o.index, o.name] for o in context.run.expert if o.index is not None and o.name],
    }


def _all_to_one(context: Context) -> dict[Split, NDArray[np.int64]]:
    return {
        split: np.zeros(context.data.documents(split).n_documents, dtype=np.int64)
        for split in SPLITS
    }


def _by_folder(context: Context) -> dict[Split, NDArray[np.int64]]:
    return {split: context.data.documents(split).domain_index.astype(np.int64) for split in SPLITS}


def _discover(context: Context) -> tuple[dict[Split, NDArray[np.int64]], Tensor]:
    """Balanced EM on the training documents; the others follow by score less price."""
    train = context.data.documents("train")
    with context.console.status("finding domains"):
        domains = discover_unigram(
            train,
            context.model.vocab_size,
            context.n_experts,
            rounds=context.run.mixture.discover_rounds,
            random_seed=context.run.run.random_seed,
        )
        expert = {
            split: assign_documents(
                domains, context.data.documents(split), balanced=split == "train"
            ).expert.numpy()
            for split in SPLITS
        }
    if context.run.mixture.discover_scores == "lm":
        return _refine(context, expert["train"])
    return expert, domains.prices


def _refine(
    context: Context, expert: NDArray[np.int64]
) -> tuple[dict[Split, NDArray[np.int64]], Tensor]:
    """Go on from the unigram domains with tiny language models: train, score, divide, repeat."""
    train = context.data.documents("train")
    lengths = torch.from_numpy(train.lengths).double()
    for round_number in range(_LM_ROUNDS):
        expert = _begun_with(context, round_number, expert)
        models = [
            train_tiny_lm(
                context.run,
                train.select(np.flatnonzero(expert == e)),
                context.folder.discovery_model(round_number, e),
                name=f"domain {e}, round {round_number + 1}",
                device=context.device,
                console=context.console,
            )
            for e in range(context.n_experts)
        ]
        assignment = assign_with_prices(_scores(context, models, train), weights=lengths)
        expert = assignment.expert.numpy()
    divided: dict[Split, NDArray[np.int64]] = {"train": expert}
    for split in ("valid", "test"):
        documents = context.data.documents(split)
        scores = _scores(context, models, documents).double()
        weights = torch.from_numpy(documents.lengths).double()
        divided[split] = apply_prices(scores, assignment.prices, weights).numpy()
    return divided, assignment.prices


def _begun_with(
    context: Context, round_number: int, expert: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The division with which a round was begun, if it was, else `expert`.

    Scores differ in the last digit with the number of threads, and so may a document's place: tiny
    models trained on it before a stop could not go on.
    """
    folder = context.folder.discovery_division(round_number)
    metadata = _metadata(context)
    if is_complete(folder, metadata):
        return read_tensors(folder / "documents.safetensors")["train"].numpy()
    with write_folder_atomically(folder, metadata=metadata) as new:
        write_tensors(new / "documents.safetensors", {"train": torch.from_numpy(expert)})
    return expert


def _scores(context: Context, models: list[Transformer], documents: Documents) -> Tensor:
    with context.console.status(f"scoring {documents.n_documents:,} documents"):
        return document_scores(models, documents, context.run.data.seq_len)


def _write(
    context: Context,
    expert: dict[Split, NDArray[np.int64]],
    prices: Tensor | None,
    metadata: dict[str, Json],
) -> None:
    train = context.data.documents("train")
    names = _names(context, expert["train"])
    counts = count_tokens(train, expert["train"], context.n_experts, context.model.vocab_size)
    tokens = counts.sum(dim=1)
    _refuse_starving(names, tokens, context.run.data.seq_len)
    tensors: dict[str, Tensor] = {split: torch.from_numpy(e) for split, e in expert.items()}
    tensors["counts"] = counts
    with write_folder_atomically(context.folder.assignment, metadata=metadata) as folder:
        write_tensors(folder / "documents.safetensors", tensors)
        summary: dict[str, Json] = {
            "experts": names,
            "load": [round(float(t / tokens.sum()), 5) for t in tokens],
            "prices": None if prices is None else prices.tolist(),
            "domains": _domain_table(train, expert["train"], names),
        }
        write_json(folder / "assignment.json", summary)


def count_tokens(
    documents: Documents, expert: NDArray[np.int64], n_experts: int, vocab_size: int
) -> Tensor:
    """How often each expert's documents hold each token, (E, V) int64."""
    counts = np.zeros((n_experts, vocab_size), dtype=np.int64)
    for document, e in enumerate(expert):
        counts[e] += np.bincount(documents.tokens(document), minlength=vocab_size)
    return torch.from_numpy(counts)


def _refuse_starving(names: list[str], tokens: Tensor, seq_len: int) -> None:
    for name, n in zip(names, tokens.tolist(), strict=True):
        if n <= seq_len:
            raise DataError(
                f"expert `{name}` would get {n:,} training tokens, less than one sequence of "
                f"{seq_len:,}",
                hint="add data, lower `mixture.n_experts` or `data.seq_len`",
            )


def _names(context: Context, expert: NDArray[np.int64]) -> list[str]:
    """`[[expert]] name`, or the domain that gives an expert most of its tokens."""
    train = context.data.documents("train")
    names: list[str] = []
    for e in range(context.n_experts):
        override = context.run.override_of(e)
        own = expert == e
        tokens = np.bincount(
            train.domain_index[own], weights=train.lengths[own], minlength=len(train.domains)
        )
        name = train.domains[int(tokens.argmax())] if context.n_experts > 1 else "model"
        if override is not None and override.name is not None:
            name = override.name
        used = Counter(n.rsplit("-", 1)[0] if n.rsplit("-", 1)[-1].isdigit() else n for n in names)
        names.append(f"{name}-{used[name] + 1}" if used[name] else name)
    return names


def _domain_table(
    documents: Documents, expert: NDArray[np.int64], names: list[str]
) -> dict[str, Json]:
    """Training tokens of every domain (rows) that every expert got."""
    table = np.zeros((len(documents.domains), len(names)), dtype=np.int64)
    np.add.at(table, (documents.domain_index, expert), documents.lengths)
    return {
        domain: dict(zip(names, row.tolist(), strict=True))
        for domain, row in zip(documents.domains, table, strict=True)
    }
