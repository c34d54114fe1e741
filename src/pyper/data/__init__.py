"""Text to batches: readers, tokenizer, shards, packing, loader."""

from pyper.data.embedded import HarvestReport, harvest
from pyper.data.loader import Batch, Loader, LoaderPosition
from pyper.data.manifest import DataManifest, ShardEntry, SplitEntry
from pyper.data.packing import Packing
from pyper.data.prepare import prepare
from pyper.data.readers import Document, ReadCounts, read_documents
from pyper.data.shards import Documents, ShardWriter, TokenData
from pyper.data.sources import SPLITS, Split
from pyper.data.tokenizer import BOS, TextTokenizer

__all__ = [
    "BOS",
    "SPLITS",
    "Batch",
    "DataManifest",
    "Document",
    "Documents",
    "HarvestReport",
    "Loader",
    "LoaderPosition",
    "Packing",
    "ReadCounts",
    "ShardEntry",
    "ShardWriter",
    "Split",
    "SplitEntry",
    "TextTokenizer",
    "TokenData",
    "harvest",
    "prepare",
    "read_documents",
]
