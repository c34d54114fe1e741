"""Write text: sampling, decoding with caches, streaming."""

from pyper.generate.engine import Completion, Piece, complete, encode_prompt, stream
from pyper.generate.sampling import SamplingConfig, filtered_probs, next_token
from pyper.generate.text import TextStream

__all__ = [
    "Completion",
    "Piece",
    "SamplingConfig",
    "TextStream",
    "complete",
    "encode_prompt",
    "filtered_probs",
    "next_token",
    "stream",
]
