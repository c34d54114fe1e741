"""Write text from one expert or a mixture: the engine for a fixed list of prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pyper.data import TextTokenizer
from pyper.errors import PromptError
from pyper.generate.batch_engine import BatchEngine
from pyper.generate.request import EngineLimits, FinishReason, Request
from pyper.generate.sampling import SamplingConfig
from pyper.generate.speculation import Drafter
from pyper.mixture import Mixture
from pyper.nn import PAGE_TOKENS


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


def stream(
    mixture: Mixture,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    drafter: Drafter | None = None,
) -> Iterator[Piece]:
    """Write after each prompt; pieces come as they are made, the rows side by side.

    A row's text depends on its prompt, its place in the list and the seed, not on its neighbours,
    and not on the drafter, which guesses tokens while that is faster. Raises PromptError.
    """
    if not prompts:
        raise PromptError("there is no prompt", hint='pass one, `""` begins a document')
    context = mixture.settings.seq_len
    encoded = [encode_prompt(tokenizer, prompt, context) for prompt in prompts]
    room = _room_for(mixture, encoded, config)
    engine = BatchEngine(mixture, tokenizer, room, drafter=drafter)
    row_of = {
        engine.submit(Request(tuple(prompt), replace(config, seed=config.seed + row))): row
        for row, prompt in enumerate(encoded)
    }
    while not engine.idle:
        for event in engine.step():
            yield Piece(
                row_of[event.request_id],
                event.token,
                event.text,
                event.expert,
                event.weights,
                event.finished,
            )


def _room_for(
    mixture: Mixture, prompts: Sequence[Sequence[int]], config: SamplingConfig
) -> EngineLimits:
    """So much that all prompts run at once."""
    longest = [min(len(p) + config.max_new_tokens, mixture.settings.seq_len) for p in prompts]
    pages = mixture.n_experts * sum(-(-n // PAGE_TOKENS) for n in longest)
    return EngineLimits(max_running=len(prompts), cache_tokens=pages * PAGE_TOKENS)


def complete(
    mixture: Mixture,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    drafter: Drafter | None = None,
) -> list[Completion]:
    """`stream`, collected: one completion per prompt."""
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream(mixture, tokenizer, prompts, config, drafter):
        pieces[piece.row].append(piece)
    return [
        Completion("".join(p.text for p in row), tuple(row), row[-1].finished or "length")
        for row in pieces
    ]
