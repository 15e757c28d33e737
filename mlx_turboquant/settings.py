"""The settings of a compressed cache."""

from dataclasses import dataclass
from typing import Any

from .allocation import check_budget
from .cache import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW, TurboQuantKVCache
from .codebook import check_bits
from .method_cache import MethodKVCache

AUTO = "auto"
DEFAULT_KL_BUDGET = 0.005


@dataclass(frozen=True)
class Settings:
    """The arguments of :func:`.integration.make_prompt_cache` that are not about one model.

    Raises:
        ValueError: arguments that are out of range or do not fit together.
    """

    bits: float | str = 4
    key_bits: int | None = None
    value_bits: int | None = None
    uniform: bool = False
    kl_budget: float | None = None
    window: int = DEFAULT_WINDOW
    sink_tokens: int = DEFAULT_SINK_TOKENS
    max_size: int | None = None
    seed: int = 0
    codec: str | None = None

    def __post_init__(self):
        for bits in (self.key_bits, self.value_bits):
            if bits is not None:
                check_bits(bits)
        if self.bits == AUTO:
            self._check_auto()
        else:
            if self.codec is None:
                check_budget(self.bits)
            if self.kl_budget is not None:
                raise ValueError(
                    f"A KL budget of {self.kl_budget} goes with auto, not with {self.bits:g} bits: "
                    "use one of them."
                )
        if self.codec is None:
            TurboQuantKVCache(**self.of_cache)
        else:
            MethodKVCache(*self.even_bits, codec=self.codec, **self.of_cache)

    @property
    def of_cache(self) -> dict[str, Any]:
        """The arguments of the cache of a layer, besides its bits."""
        names = ("window", "sink_tokens", "max_size", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def even_bits(self) -> tuple[int, int]:
        """Bits of keys and values for other codecs: the same, or one more of keys at a half."""
        key_bits, value_bits = int(self.bits + 0.5), int(self.bits)
        return self.key_bits or key_bits, self.value_bits or value_bits

    def _check_auto(self) -> None:
        if (self.key_bits, self.value_bits, self.uniform) != (None, None, False):
            raise ValueError("auto chooses the bits of keys and values: leave them out.")
        if self.codec is not None:
            raise ValueError(
                f"Codec {self.codec} cannot choose its bits: use a number of bits with it."
            )
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise ValueError(
                f"A KL budget of {self.kl_budget} is not possible: use a positive number of nats."
            )
