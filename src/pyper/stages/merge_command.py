"""From the options of `pyper merge` to a merge, and its result for people."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from pyper.config import SparseConfig, load_run
from pyper.config.explain import nearest
from pyper.config.load import validate
from pyper.config.sparse import Routing
from pyper.errors import ConfigError, UsageError
from pyper.stages.change import refuse_overwriting
from pyper.stages.context import pick_device
from pyper.stages.merge import MergePlan, Router, add_to_merged, merge_run


@dataclass(frozen=True)
class MergeOptions:
    """As typed."""

    routing: str
    top_k: int
    router: str
    attention: str
    average: bool
    upcycle: int | None
    noise: float
    add: str | None
    device: str


def merge_command(
    run_file: Path, output: Path, options: MergeOptions, console: Console
) -> dict[str, Any]:
    """Check the options and do it.

    Raises ConfigError, UsageError for a number out of range, and what `merge_run` raises.
    """
    refuse_overwriting(output)
    if options.add is not None:
        run, colon, name = options.add.rpartition(":")
        if not colon:
            raise ConfigError(f"`--add {options.add}` is not RUN:EXPERT", hint="e.g. runs/law:law")
        device = str(pick_device(options.device))
        return add_to_merged(run_file, Path(run), name, output, device)
    _one_of("--routing", options.routing, get_args(Routing))
    _one_of("--router", options.router, get_args(Router))
    _one_of("--attention", options.attention, ("average", "soft"))
    _check_noise(options.noise)
    n_experts = options.upcycle or load_run(run_file).mixture.n_experts
    plan = MergePlan(
        sparse=_sparse_of(options, n_experts),
        router=options.router,  # type: ignore[arg-type]
        average=options.average,
        upcycle=options.upcycle is not None,
        noise_std=options.noise,
        device=options.device,
    )
    return merge_run(run_file, output, plan, console)


def _sparse_of(options: MergeOptions, n_experts: int) -> SparseConfig:
    by_token = options.routing == "token_choice"
    if by_token and not 1 <= options.top_k <= n_experts:
        raise UsageError(
            f"`--top-k` must be in [1, {n_experts}], the number of experts, not {options.top_k}",
            hint="`1` costs as much as a dense layer, `2` twice that",
        )
    values: dict[str, Any] = {
        "n_experts": n_experts,
        "routing": options.routing,
        "attention_experts": n_experts if options.attention == "soft" else 0,
        "normalize_gates": by_token,
    }
    return validate(SparseConfig, values | ({"top_k": options.top_k} if by_token else {}))


def _check_noise(noise: float) -> None:
    if not 0 <= noise < float("inf"):
        raise UsageError(
            f"`--noise` must be a finite number, 0 or more, not {noise:g}",
            hint="`0.01` is a hundredth of each matrix' root mean square",
        )


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"`{option}` does not know `{value}`", hint=nearest(value, known))


def merge_table(result: dict[str, Any]) -> Table:
    """Losses before and after, on the same validation text; or what was added."""
    if "loss" not in result:
        table = Table(show_header=False, box=None)
        table.add_row(result["path"], f"{result['n_experts']} experts in every sparse layer")
        table.add_row(
            "", f"cosine of the new feed-forwards with the others: {result['cosine']:.3f}"
        )
        return table
    table = Table(title="validation loss before any tuning, nats per token")
    table.add_column("model")
    table.add_column("loss", justify="right")
    for name, loss in result.get("before", {}).items():
        table.add_row(name.replace("_", " "), f"{loss:.3f}", style="dim")
    table.add_row("merged", f"{result['loss']:.3f}", style="bold")
    if result.get("barrier") is not None:
        table.caption = f"barrier between neighbouring experts: {result['barrier']:+.3f}"
    return table
