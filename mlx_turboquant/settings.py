"""The settings of a compressed cache."""

from dataclasses import dataclass
from typing import Any

from .allocation import check_budget
from .cache import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW, TurboQuantKVCache
from .codebook import check_bits


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`.integration.make_prompt_cache` that are not about one model.

    Raises:
        ValueError: arguments that are out of range or do not fit together.
    """

    bits: float = 4
    key_bits: int | None = None
    value_bits: int | None = None
    uniform: bool = False
    window: int = DEFAULT_WINDOW
    sink_tokens: int = DEFAULT_SINK_TOKENS
    max_size: int | None = None
    seed: int = 0

    def __post_init__(self):
        for bits in (self.key_bits, self.value_bits):
            if bits is not None:
                check_bits(bits)
        check_budget(self.bits)
        TurboQuantKVCache(**self.of_cache)

    @property
    def of_cache(self) -> dict[str, Any]:
        """The arguments of the cache of a layer, besides its bits."""
        names = ("window", "sink_tokens", "max_size", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def is_fixed(self) -> bool:
        """Whether all layers have the same bits, so that nothing of the model is needed."""
        return self.uniform or None not in (self.key_bits, self.value_bits)
