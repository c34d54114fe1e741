"""Write text from a saved model, for a terminal or as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pyper.data import TextTokenizer
from pyper.errors import ConfigError, UsageError
from pyper.generate import (
    Drafter,
    Narrow,
    RepetitionDrafter,
    RouterDrafter,
    SamplingConfig,
    complete,
    stream,
    with_narrow_weights,
)
from pyper.mixture import Mixture, MixtureSettings, load_mixture
from pyper.stages.context import pick_device
from pyper.stages.draft import open_drafter

# Readable on dark and on light backgrounds.
_STYLES = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | dict.fromkeys(
    range(127, 160), "\ufffd"
)
_PICTURES |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): ""}


def style_of(expert: int) -> str:
    """The colour of an expert's text."""
    return _STYLES[expert % len(_STYLES)]


def visible(text: str) -> str:
    """Control characters as pictures: a model must not be able to steer the terminal."""
    return text.translate(_PICTURES)


@dataclass(frozen=True)
class OpenModel:
    """A mixture, or one of its experts as a mixture of one."""

    mixture: Mixture
    tokenizer: TextTokenizer
    drafter: Drafter | None = None
    """Guesses what is written, where somebody does."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the experts."""
        return self.mixture.settings.experts


def open_model(
    path: Path,
    *,
    expert: str | None,
    mixing: str | None,
    resident: int | None,
    device: str,
    narrow: Narrow | None = None,
    speculate: bool = False,
    draft: str | None = None,
) -> OpenModel:
    """Open the mixture of a run; narrow: with eight-bit weights.

    speculate: guess what repeats. draft: who guesses instead, see `open_drafter`. Raises
    CheckpointError, ConfigError for an unknown expert, UsageError for one that is to be mixed, and
    what `open_drafter` raises.
    """
    if expert is not None and mixing is not None:
        raise UsageError(
            f"expert `{expert}` alone mixes with nothing: `mixing` is for several",
            hint="leave one of `--expert` and `--mixing` out",
        )
    mixture, tokenizer = load_mixture(path, device=pick_device(device), resident=resident)
    if narrow is not None:
        mixture = with_narrow_weights(mixture, narrow)
    if mixing is not None:
        mixture.settings = _with_mixing(mixture.settings, mixing)
    drafter: Drafter | None = RepetitionDrafter() if speculate else None
    if draft is not None:
        drafter = open_drafter(draft, mixture, tokenizer, pick_device(device))
    if expert is None:
        return OpenModel(mixture, tokenizer, drafter)
    if isinstance(drafter, RouterDrafter):  # the router knows each expert; one is left
        drafter = drafter.drafters[find_expert(mixture.settings.experts, expert)]
    return OpenModel(only_expert(mixture, expert), tokenizer, drafter)


def _with_mixing(settings: MixtureSettings, mixing: str) -> MixtureSettings:
    known = ("posterior", "top1", "window")
    if mixing not in known:
        raise ConfigError(f"unknown mixing `{mixing}`", hint=f"one of {', '.join(known)}")
    return settings.model_copy(update={"mixing": mixing})


def find_expert(names: Sequence[str], wanted: str) -> int:
    """The expert of that name or number. Raises ConfigError."""
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise ConfigError(
        f"there is no expert `{wanted}`", hint=f"0 … {len(names) - 1}, or {', '.join(names)}"
    )


def only_expert(mixture: Mixture, expert: str) -> Mixture:
    """One expert as a mixture of one. Raises ConfigError."""
    names = mixture.settings.experts
    index = find_expert(names, expert)
    settings = mixture.settings.model_copy(
        update={"experts": (names[index],), "mixing": "posterior", "top_k": 1, "prices": ()}
    )
    return Mixture(settings, [lambda: mixture.expert(index)], None)


def print_stream(
    model: OpenModel,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    console: Console,
    *,
    show_experts: bool = False,
) -> None:
    """Print prompts and what follows; one prompt streams, several come one after another."""
    for number, prompt in enumerate(prompts):
        if number:
            console.print()
        pieces = iter(stream(model.mixture, model.tokenizer, [prompt], sampling, model.drafter))
        first = list(islice(pieces, 1))  # a prompt that cannot be served is refused here
        console.print(Text(prompt, style="bold"), end="")
        tokens = [0] * len(model.names)
        for piece in chain(first, pieces):
            style = style_of(piece.expert) if show_experts else ""
            tokens[piece.expert] += 1
            console.print(Text(visible(piece.text), style=style), end="", soft_wrap=True)
        console.print()
        if show_experts:
            console.print(legend(model.names, tokens))


def legend(names: Sequence[str], tokens: Sequence[int]) -> Text:
    """Who wrote how much."""
    text = Text("— ")
    for index, (name, n) in enumerate(zip(names, tokens, strict=True)):
        if n:
            share = f"{name} {n / sum(tokens):.0%}  "
            text.append(share, style=style_of(index))
    return text


def write_json(
    model: OpenModel, prompts: Sequence[str], sampling: SamplingConfig
) -> dict[str, Any]:
    """All completions, side by side in one batch, with the expert of every token."""
    completions = complete(model.mixture, model.tokenizer, prompts, sampling, model.drafter)
    return {
        "experts": list(model.names),
        "completions": [
            {
                "prompt": prompt,
                "text": completion.text,
                "finished": completion.finished,
                "tokens": [
                    {"text": p.text, "expert": model.names[p.expert]} for p in completion.pieces
                ],
            }
            for prompt, completion in zip(prompts, completions, strict=True)
        ],
    }
