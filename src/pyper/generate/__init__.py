"""Write text: sampling, decoding with caches, streaming."""

from pyper.generate.batch_engine import BatchEngine
from pyper.generate.engine import Completion, Piece, complete, encode_prompt, stream
from pyper.generate.narrow_weights import Narrow, with_narrow_weights
from pyper.generate.request import EngineLimits, EngineStats, Event, FinishReason, Request
from pyper.generate.sampling import SamplingBatch, SamplingConfig, draw, filtered_probs
from pyper.generate.speculation import Drafter, ModelDrafter, RepetitionDrafter, RouterDrafter
from pyper.generate.text import TextStream

__all__ = [
    "BatchEngine",
    "Completion",
    "Drafter",
    "EngineLimits",
    "EngineStats",
    "Event",
    "FinishReason",
    "ModelDrafter",
    "Narrow",
    "Piece",
    "RepetitionDrafter",
    "Request",
    "RouterDrafter",
    "SamplingBatch",
    "SamplingConfig",
    "TextStream",
    "complete",
    "draw",
    "encode_prompt",
    "filtered_probs",
    "stream",
    "with_narrow_weights",
]
