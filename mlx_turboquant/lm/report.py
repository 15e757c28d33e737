"""Reports on a prompt cache: which layers are compressed, why others are not, and their bytes."""

import logging
from typing import Any, NamedTuple

import mlx.nn as nn

from ..codec.trellis import MOST_BITS
from ..kernels.tokens import BLOCK
from .allocation import expected_divergence
from .compressible import flat_caches
from .compression import compression_of

_WHY_NOT = {
    "RotatingKVCache": "sliding window, bounded already",
    "ChunkedKVCache": "attention in chunks, bounded already",
    "ArraysCache": "recurrent state, no tokens",
    "KVCache": "read by an index of the model's own",
}

_log = logging.getLogger("mlx_turboquant")


class CacheSize(NamedTuple):
    """Tokens and bytes of a prompt cache, and ``fp16_nbytes``, those of its tokens in 16 bits.

    ``unpacked`` is how many tokens stay exact before the first are packed, or 0 if some are packed.
    """

    tokens: int
    nbytes: int
    fp16_nbytes: int
    unpacked: int = 0

    def __str__(self) -> str:
        held = f"{self.tokens:,} tokens, {self.nbytes / 1e6:,.2f} MB"
        if self.unpacked:
            return f"{held} (nothing is packed yet: the first {self.unpacked} tokens stay exact)"
        fp16, ratio = f"{self.fp16_nbytes / 1e6:,.2f} MB", self.fp16_nbytes / max(self.nbytes, 1)
        if 0 < ratio < 1:
            return f"{held} (more than {fp16} in fp16: exact tokens outweigh the packed ones)"
        return f"{held} (fp16: {fp16}, ratio {ratio:.2f})"


class LayerKind(NamedTuple):
    """The layers with one class of cache, and their bytes together.

    ``bits`` is the mean number of bits of their values, without scales, or None if they are not
    compressed.
    """

    cache: str
    layers: int
    bits: float | None
    remark: str
    nbytes: int
    fp16_nbytes: int


class CacheReport(NamedTuple):
    """The size of a prompt cache, its layers by class, and the bits of the compressed ones.

    ``has_axes`` says for each of them whether its keys have axes of their own. ``token_nbytes`` are
    the bytes of one more token in compressed layers. ``divergence`` is the expected KL divergence
    of the output with these bits, in nats. ``heaviest`` names the three sides (keys or values) of
    layers with the largest shares. Both are None without a profile.
    """

    size: CacheSize
    kinds: list[LayerKind]
    key_bits: list[int]
    value_bits: list[int]
    has_axes: list[bool]
    token_nbytes: int
    divergence: float | None = None
    heaviest: list[str] | None = None

    @property
    def compressed_layers(self) -> int:
        """The number of compressed caches."""
        return len(self.key_bits)

    def __str__(self) -> str:
        rows = [("cache", "layers", "bits", "MB", "MB in fp16", "")]
        for cache, layers, bits, remark, *sizes in self.kinds:
            bits = "exact" if bits is None else f"{bits:.4g}"
            rows.append((cache, str(layers), bits, *(f"{x / 1e6:,.2f}" for x in sizes), remark))
        columns = []
        for align, column in zip("<><>><", zip(*rows)):
            width = max(map(len, column))
            columns.append([f"{cell:{align}{width}}" for cell in column])
        lines = ["  ".join(row).rstrip() for row in zip(*columns)]
        if not self.compressed_layers:
            return "\n".join([*lines, "Nothing is compressed."])
        for name, bits in (("keys", self.key_bits), ("values", self.value_bits)):
            lines.append(f"bits of {name:7} {' '.join(map(str, bits))}")
        if any(self.has_axes):
            marks = ("+" if each else "-" for each in self.has_axes)
            lines.append(f"axes of keys    {' '.join(marks)}  (+ learned, - random rotation)")
        line = f"{self.token_nbytes:,} bytes a token"
        if self.divergence is not None:
            line += f", expected divergence {self.divergence:.2g} nats"
            line += f", most of it from {', '.join(self.heaviest)}"
        return "\n".join([*lines, line])


def cache_size(cache: list[Any]) -> CacheSize:
    """Tokens and bytes of a prompt cache, including layers that are not compressed."""
    layers = flat_caches(cache)
    compressed = [layer for layer in layers if hasattr(layer, "packed_tokens")]
    packed = any(layer.packed_tokens for layer in compressed)
    exact = max((x.sink_tokens + x.window + BLOCK - 1 for x in compressed), default=0)
    return CacheSize(
        max((layer.size() for layer in layers), default=0),
        sum(layer.nbytes for layer in layers),
        sum(getattr(layer, "fp16_nbytes", layer.nbytes) for layer in layers),
        0 if packed else exact,
    )


def cache_report(cache: list[Any], model: nn.Module | None = None) -> CacheReport:
    """Report on a prompt cache, a list of one cache per layer; warn if nothing is compressed.

    With a ``model`` that has a profile, the report includes the expected divergence.
    """
    groups: dict[str, list[Any]] = {}
    for layer in flat_caches(cache):
        groups.setdefault(type(layer).__name__, []).append(layer)
    compressed = [layer for layer in flat_caches(cache) if hasattr(layer, "packed_tokens")]
    report = CacheReport(
        cache_size(cache),
        [_layer_kind(name, layers) for name, layers in groups.items()],
        [layer.key_bits for layer in compressed],
        [layer.value_bits for layer in compressed],
        [layer.settings.basis is not None for layer in compressed],
        sum(layer.token_nbytes for layer in compressed),
    )
    if not compressed:
        names = ", ".join(groups) or "none"
        _log.warning("No layer of this cache is compressed (its caches: %s).", names)
    expected = None if model is None else compression_of(model).expected
    if expected is None or len(expected) != len(compressed):
        return report
    expected = [layer.coded(each.codec) for layer, each in zip(expected, compressed)]
    bits = list(zip(report.key_bits, report.value_bits))
    shares = [
        (side.divergences[b], f"{name} of layer {i}")
        for i, (layer, pair) in enumerate(zip(expected, bits))
        for name, side, b in zip(("keys", "values"), layer, pair)
        if side is not None
    ]
    heaviest = [name for _, name in sorted(shares, reverse=True)[:3]]
    return report._replace(divergence=expected_divergence(expected, bits), heaviest=heaviest)


def _layer_kind(name: str, layers: list[Any]) -> LayerKind:
    if hasattr(layers[0], "packed_tokens"):
        packed, exact = layers[-1].packed_tokens, layers[-1].exact_tokens
        remark = f"{packed:,} tokens a layer packed, {exact:,} exact"
        fewest = min(min(each.key_bits, each.value_bits) for each in layers)
        if layers[-1].codec == "trellis" and fewest <= MOST_BITS:
            remark += f", trellis codes up to {MOST_BITS} bits"
        bits = _mean_bits(layers)
    else:
        kind = name.removeprefix("Batch")
        remark, bits = _WHY_NOT.get(kind, "a kind that is left as it is"), None
    size = cache_size(layers)
    return LayerKind(name, len(layers), bits, remark, size.nbytes, size.fp16_nbytes)


def _mean_bits(layers: list[Any]) -> float:
    """The mean number of bits of the values of compressed layers, without scales."""
    pairs = [(layer.side_values, (layer.key_bits, layer.value_bits)) for layer in layers]
    sides = [side for values, bits in pairs for side in zip(values or (1, 1), bits)]
    return sum(values * bits for values, bits in sides) / sum(values for values, _ in sides)
