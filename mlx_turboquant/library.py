"""The public names of the package."""

from .cache.single import TurboQuantKVCache
from .codec.quantizer import QuantizedVectors, TurboQuantizer
from .lm.enable import disable, enable, make_prompt_cache
from .lm.prompt_cache import load_prompt_cache, save_prompt_cache
from .lm.report import CacheReport, CacheSize, cache_report, cache_size
from .search import SearchResult, VectorIndex

__all__ = [
    "CacheReport",
    "CacheSize",
    "QuantizedVectors",
    "SearchResult",
    "TurboQuantKVCache",
    "TurboQuantizer",
    "VectorIndex",
    "cache_report",
    "cache_size",
    "disable",
    "enable",
    "load_prompt_cache",
    "make_prompt_cache",
    "save_prompt_cache",
]
