"""The settings of the compressed caches of a model."""

from dataclasses import dataclass
from typing import TypedDict

from ..cache.blocks import DEFAULT_SINK_TOKENS, DEFAULT_WINDOW, CacheSettings
from ..codec.basis import Basis
from ..codec.codebook import check_bits
from .allocation import check_budget, uniform_bits


class CacheOptions(TypedDict, total=False):
    """The fields of :class:`Settings` besides ``bits``, as keyword arguments."""

    key_bits: int | None
    value_bits: int | None
    uniform: bool
    window: int
    sink_tokens: int
    max_size: int | None
    seed: int
    codec: str


@dataclass(frozen=True)
class Settings:
    """How the caches of a model are compressed.

    Attributes:
        bits: Mean bits per value, 2 to 8 in quarters, which are allocated by the profile of the
            model.
        key_bits: Bits per value of all keys, 1 to 8.
        value_bits: Bits per value of all values, 1 to 8.
        uniform: Give all layers the same bits, for comparison.
        window: Recent tokens that stay exact.
        sink_tokens: First tokens that stay exact.
        max_size: The most tokens that a layer holds; beyond it, the oldest are forgotten.
        seed: Seed of the random rotation.
        codec: The kind of codes, "scalar" or "trellis", see :class:`.TurboQuantizer`.

    Raises:
        ValueError: a field that is out of range, or fields that do not fit together.
    """

    bits: float = 4
    key_bits: int | None = None
    value_bits: int | None = None
    uniform: bool = False
    window: int = DEFAULT_WINDOW
    sink_tokens: int = DEFAULT_SINK_TOKENS
    max_size: int | None = None
    seed: int = 0
    codec: str = "scalar"

    def __post_init__(self):
        check_budget(self.bits)
        for bits in (self.key_bits, self.value_bits):
            if bits is not None:
                check_bits(bits)
        self.of_layer(1, 1).limit()

    def __str__(self) -> str:
        """The bits, in the form in which users give them, and a codec that is not scalar."""
        fixed = "K{}V{}".format(*self.fixed_bits())
        bits = fixed if self.is_fixed else f"{self.bits:g} bits per value"
        return bits if self.codec == "scalar" else f"{bits} in {self.codec} codes"

    def of_layer(self, key_bits: int, value_bits: int, basis: Basis | None = None) -> CacheSettings:
        """The settings of the cache of a layer with these bits."""
        own = self.window, self.sink_tokens, self.max_size, self.seed, self.codec
        return CacheSettings(key_bits, value_bits, *own, basis)

    @property
    def is_fixed(self) -> bool:
        """Whether all layers have the same bits, so that no plan is needed."""
        return self.uniform or None not in (self.key_bits, self.value_bits)

    def fixed_bits(self) -> tuple[int, int]:
        """The bits of keys and values of all layers, if they are fixed."""
        key_bits, value_bits = uniform_bits(self.bits)
        return self.key_bits or key_bits, self.value_bits or value_bits
