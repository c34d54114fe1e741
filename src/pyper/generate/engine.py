"""Write text from one expert or a mixture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.generate.decoding import MixtureDecoder
from pyper.generate.request import FinishReason
from pyper.generate.sampling import SamplingConfig, next_token
from pyper.generate.text import TextStream
from pyper.mixture import Mixture


@dataclass(frozen=True)
class Piece:
    """What one step added to one row."""

    row: int
    token: int | None
    """None when only held-back text is released at the end."""
    text: str
    expert: int
    """The expert with the largest weight."""
    weights: tuple[float, ...]
    """Of all experts."""
    finished: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """The whole of one row."""

    text: str
    pieces: tuple[Piece, ...]
    finished: FinishReason


def encode_prompt(tokenizer: TextTokenizer, prompt: str, context: int) -> list[int]:
    """Tokens of a prompt behind the document token.

    Raises PromptError when it is too long, or was given in bytes that are no UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise PromptError("the prompt is not UTF-8 text", hint="convert it to UTF-8") from None
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(tokens) >= context:
        raise PromptError(
            f"the prompt has {len(tokens):,} tokens and the context holds {context:,}",
            hint=f"shorten it to at most {context - 1:,} tokens",
        )
    return tokens


@torch.no_grad()
def stream(
    mixture: Mixture, tokenizer: TextTokenizer, prompts: Sequence[str], config: SamplingConfig
) -> Iterator[Piece]:
    """Write after each prompt; pieces come as they are made, the rows side by side.

    A row's text depends on its prompt, its place in the list and the seed, not on its neighbours.
    Raises PromptError.
    """
    if not prompts:
        raise PromptError("there is no prompt", hint='pass one, `""` begins a document')
    context = mixture.settings.seq_len
    encoded = [encode_prompt(tokenizer, prompt, context) for prompt in prompts]
    limits = [min(len(p) + config.max_new_tokens, context) for p in encoded]
    decoder = MixtureDecoder(mixture, encoded, max(limits))
    texts = [TextStream(tokenizer, config.stop) for _ in prompts]
    generators = [torch.Generator().manual_seed(config.seed + row) for row in range(len(prompts))]
    rows = torch.arange(len(prompts))
    while len(rows):
        log_probs, weights = decoder.next_log_probs(rows)
        drawn, going = [], []
        for i, row in enumerate(rows.tolist()):
            seen = decoder.tokens[row, : decoder.lengths[row]]
            token = next_token(log_probs[i], seen, config, generators[row])
            at_limit = int(decoder.lengths[row]) + 1 >= limits[row]
            piece = _make_piece(row, token, texts[row], weights[i], tokenizer.bos_id, at_limit)
            yield piece
            drawn.append(token)
            going.append(piece.finished is None)
        keep = torch.tensor(going)
        decoder.append(rows[keep], torch.tensor(drawn)[keep])
        rows = rows[keep]


def _make_piece(
    row: int, token: int, text: TextStream, weights: torch.Tensor, bos_id: int, at_limit: bool
) -> Piece:
    """One token as text, and whether it ends the row: a new document, a stop string, the limit."""
    finished: FinishReason | None = None
    shown = ""
    if token == bos_id:
        finished = "stop"
    else:
        shown = text.push(token)
        if text.stopped:
            finished = "stop"
        elif at_limit:
            finished = "length"
    if finished is not None:
        shown += text.finish()
    expert = int(weights.argmax())
    return Piece(row, token, shown, expert, tuple(weights.tolist()), finished)


def complete(
    mixture: Mixture, tokenizer: TextTokenizer, prompts: Sequence[str], config: SamplingConfig
) -> list[Completion]:
    """`stream`, collected: one completion per prompt."""
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream(mixture, tokenizer, prompts, config):
        pieces[piece.row].append(piece)
    return [
        Completion("".join(p.text for p in row), tuple(row), row[-1].finished or "length")
        for row in pieces
    ]
