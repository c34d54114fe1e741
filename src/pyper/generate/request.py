"""What is asked of the engine, and what it answers."""

from dataclasses import dataclass
from typing import Literal

from pyper.generate.sampling import SamplingConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One text to be continued."""

    prompt: tuple[int, ...]
    """Token ids; the first is the document token."""
    sampling: SamplingConfig
    expert: int | None = None
    """Only this expert writes; None: the mixture's rule."""
    n_logprobs: int = 0
    """How many alternatives to report with every token."""


@dataclass(frozen=True)
class Event:
    """What one step added to one request."""

    request_id: int
    token: int | None
    """None when only held-back text is released at the end."""
    text: str
    """New text; bytes of half a character, and what may begin a stop string, are held back."""
    log_prob: float
    """Of `token`, under the mixture, before temperature and filters."""
    alternatives: tuple[tuple[int, float], ...]
    """The `n_logprobs` likeliest tokens with their log-probabilities, likeliest first."""
    expert: int
    """The one with the largest weight."""
    weights: tuple[float, ...]
    """Of all experts."""
    finished: FinishReason | None


@dataclass(frozen=True)
class EngineLimits:
    """How much runs at once, and how."""

    max_running: int = 64
    """Requests that are decoded side by side; others wait."""
    cache_tokens: int = 65_536
    """Tokens whose keys and values can be held, over all requests and experts."""
    prefill_chunk: int | None = None
    """Prompt tokens that an expert reads in one step, over all requests: the others go on in
    between. None: 512 on a CPU; 4,096 on a GPU, where the host takes as long for a few."""
    compiled: bool = False
    """On a GPU: decoding goes through `torch.compile`; the first steps take a minute."""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine was made, and what it holds now."""

    running: int
    waiting: int
    cache_tokens_used: int
    cache_tokens_total: int
    prefill_tokens: int
    decoded_tokens: int
    reused_tokens: int
    """Prompt tokens that were not read again because another request had read them."""
    resident_experts: int
    guessed_tokens: int = 0
    """Tokens that were read on trial."""
    accepted_tokens: int = 0
    """Of those the ones that came."""
