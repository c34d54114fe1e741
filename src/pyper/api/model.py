"""A saved model as an object: it writes, scores and routes text."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyper.data import TextTokenizer
from pyper.errors import DataError, PromptError
from pyper.evaluate.harness_scores import final_weights, rolling_windows, score
from pyper.generate import Piece, SamplingConfig, complete, stream
from pyper.mixture import Mixture
from pyper.stages.write import only_expert, open_model

StrPath = str | os.PathLike[str]
Mixing = Literal["posterior", "top1", "window"]


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text."""

    nats: float
    """−log p of the whole text."""
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """The loss."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / self.bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


class Model:
    """A mixture and its tokenizer.

    Several threads may use one model at a time, unless it was loaded with `resident`.
    """

    def __init__(self, mixture: Mixture, tokenizer: TextTokenizer) -> None:
        """For what `load` and `train_expert` give."""
        self.mixture, self.tokenizer = mixture, tokenizer

    def __repr__(self) -> str:
        rule = self.mixture.settings.mixing if len(self.experts) > 1 else "one expert"
        return f"<pyper.Model of {', '.join(self.experts)}; {rule}, context {self.context:,}>"

    @property
    def experts(self) -> tuple[str, ...]:
        """Their names; `Piece.expert` counts in this order."""
        return self.mixture.settings.experts

    @property
    def context(self) -> int:
        """The most tokens of a prompt and what is written after it, the document token included."""
        return self.mixture.settings.seq_len

    def expert(self, name: str | int) -> "Model":
        """One expert alone, by its name or number; the weights are shared.

        Raises ConfigError for one that is not there.
        """
        return Model(only_expert(self.mixture, str(name)), self.tokenizer)

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 0.95,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """What the model writes after `prompt`: text without the prompt.

        temperature: 0 takes the likeliest token each time. top_k, top_p: draw among the k likeliest
        tokens, or the fewest that reach p. stop: strings that end the text, not part of it. seed:
        the same one writes the same text. Raises PromptError for a prompt that does not fit the
        context, and for settings out of range.

        >>> model.generate("Once upon a time", max_new_tokens=40, stop=["."])
        """
        sampling = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, stop=_strings(stop), seed=seed
        )
        return complete(self.mixture, self.tokenizer, [prompt], sampling)[0].text

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 0.95,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[Piece]:
        """As `generate`, piece by piece: `text`, the number of the `expert` that had the largest
        weight, and the `weights` of all.

        >>> for piece in model.stream("Once upon a time"):
        ...     print(piece.text, model.experts[piece.expert])
        """
        sampling = SamplingConfig(
            max_new_tokens, temperature, top_k, top_p, stop=_strings(stop), seed=seed
        )
        return stream(self.mixture, self.tokenizer, [prompt], sampling)

    def log_probs(self, text: str) -> Tensor:
        """log p (T,) in nats, float32 on the CPU, of each token given those before it.

        T tokens of `tokenizer.encode(text)`. A text longer than the context is read in windows, the
        last of which sees as much of what came before as there is room.

        >>> model.log_probs("to be or not to be").exp()
        """
        windows = rolling_windows(self._encode(text), self.tokenizer.bos_id, self.context)
        answers = score(self.mixture, windows, greedy=False)
        return torch.cat([torch.empty(0), *(answer.log_probs for answer in answers)])

    def score(self, text: str) -> Score:
        """How well the model predicts a text: nats, bits per byte, perplexity.

        Raises DataError for an empty text, PromptError for one that is no UTF-8.

        >>> model.score("to be or not to be").bits_per_byte
        """
        if not text:
            raise DataError("an empty text has no score", hint="leave it out")
        log_probs = self.log_probs(text)
        return Score(-float(log_probs.double().sum()), len(log_probs), len(text.encode()))

    def route(self, text: str) -> dict[str, float]:
        """The weight of each expert in what would be written after `text`; they add up to 1.

        Of a text longer than the context the beginning counts. After a few tokens several experts
        have some weight; `mixing="top1"` settles on one after the prefix that its settings say.

        >>> model.route("the party of the first part")
        {'law': 0.98, 'novels': 0.02}
        """
        tokens = [self.tokenizer.bos_id, *self._encode(text)][: self.context]
        return dict(zip(self.experts, final_weights(self.mixture, tokens), strict=True))

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PromptError("the text is not UTF-8", hint="convert it to UTF-8") from None
        return self.tokenizer.encode(text)


def load(
    path: StrPath,
    *,
    device: str = "auto",
    mixing: Mixing | None = None,
    expert: str | int | None = None,
    resident: int | None = None,
) -> Model:
    """The mixture of a run folder, a mixture's folder, or a merged model.

    device: `auto` is the GPU where there is one. mixing: instead of the saved rule. expert: one
    alone, by name or number. resident: so many experts are in memory at a time; by default all are
    read and verified now. Raises CheckpointError, ConfigError, TokenizerError.

    >>> model = pyper.load("runs/quickstart", mixing="top1")
    """
    alone = None if expert is None else str(expert)
    opened = open_model(Path(path), expert=alone, mixing=mixing, resident=resident, device=device)
    if resident is None:
        for index in range(opened.mixture.n_experts):
            opened.mixture.expert(index)
    return Model(opened.mixture, opened.tokenizer)


def _strings(stop: Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)
