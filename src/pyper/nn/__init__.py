"""One expert: a decoder-only transformer. Experts do not know how they were routed."""

from pyper.nn.counts import count_parameters, flops_per_token, train_flops_per_token
from pyper.nn.init import init_weights
from pyper.nn.kv_cache import PAGE_TOKENS, CachePass, Chunk, KVCache, KVStore
from pyper.nn.sparse_feed_forward import Routed, Rule
from pyper.nn.transformer import Reading, Transformer

__all__ = [
    "PAGE_TOKENS",
    "CachePass",
    "Chunk",
    "KVCache",
    "KVStore",
    "Reading",
    "Routed",
    "Rule",
    "Transformer",
    "count_parameters",
    "flops_per_token",
    "init_weights",
    "train_flops_per_token",
]
