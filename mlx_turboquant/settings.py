"""The settings of a compressed cache."""

from dataclasses import dataclass
from typing import Any

from .allocation import check_budget
from .cache import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW, TurboQuantKVCache
from .codebook import check_bits
from .method_cache import MethodKVCache


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
    codec: str | None = None

    def __post_init__(self):
        for bits in (self.key_bits, self.value_bits):
            if bits is not None:
                check_bits(bits)
        if self.codec is None:
            check_budget(self.bits)
            TurboQuantKVCache(**self.of_cache)
        else:
            MethodKVCache(*self.even_bits, codec=self.codec, **self.of_cache)

    @property
    def of_cache(self) -> dict[str, Any]:
        """The arguments of the cache of a layer, besides its bits."""
        names = ("window", "sink_tokens", "max_size", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def is_fixed(self) -> bool:
        """Whether all layers have the same bits, so that nothing of the model is needed."""
        split = None not in (self.key_bits, self.value_bits)
        return self.codec is not None or self.uniform or split

    @property
    def even_bits(self) -> tuple[int, int]:
        """Bits of keys and values for other codecs: the same, or one more of keys at a half."""
        key_bits, value_bits = int(self.bits + 0.5), int(self.bits)
        return self.key_bits or key_bits, self.value_bits or value_bits
