"""Text to batches: readers, tokenizer, shards, packing, loader."""

from pyper.data.batch import Batch
from pyper.data.bos_token import BOS
from pyper.data.counts import ReadCounts
from pyper.data.domain_weights import effective_tokens, epoch_documents
from pyper.data.embedded import HarvestReport, harvest
from pyper.data.loader import Loader, LoaderPosition
from pyper.data.manifest import DataManifest, ShardEntry, SplitEntry
from pyper.data.packing import Packing
from pyper.data.prepare import prepare
from pyper.data.readers import Document, read_documents
from pyper.data.shard_writer import ShardWriter
from pyper.data.shards import Documents, TokenData
from pyper.data.sources import SPLITS, Split
from pyper.data.tokenizer import TextTokenizer

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
    "effective_tokens",
    "epoch_documents",
    "harvest",
    "prepare",
    "read_documents",
]
