"""What a prompt cache holds, layer by layer: compressed or not and why, in how many bytes."""

import logging
from typing import Any, NamedTuple

from .kernels import BLOCK
from .protection import relative_error

_WHY_NOT = {
    "RotatingKVCache": "sliding window, bounded already",
    "BatchRotatingKVCache": "sliding window, bounded already",
    "ChunkedKVCache": "attention in chunks, bounded already",
    "ArraysCache": "recurrent state, no tokens",
    "KVCache": "read by an index of the model's own",
    "BatchKVCache": "read by an index of the model's own",
}

_log = logging.getLogger("mlx_turboquant")


class CacheSize(NamedTuple):
    """What a prompt cache holds. ``fp16_nbytes`` is what its tokens would take in 16 bits.

    ``unpacked`` is how many tokens stay exact before the first are packed, if none are yet, else 0.
    """

    tokens: int
    nbytes: int
    fp16_nbytes: int
    unpacked: int = 0

    def __str__(self) -> str:
        held = f"{self.tokens:,} tokens, {self.nbytes / 1e6:,.2f} MB"
        if self.unpacked:
            return f"{held} (nothing is packed yet: the first {self.unpacked} tokens stay exact)"
        ratio = self.fp16_nbytes / max(self.nbytes, 1)
        return f"{held} (fp16: {self.fp16_nbytes / 1e6:,.2f} MB, ratio {ratio:.2f})"


class LayerKind(NamedTuple):
    """Layers whose caches are of one kind. ``key_bits`` is None if they are not compressed."""

    cache: str
    layers: int
    key_bits: int | None
    value_bits: int | None
    remark: str
    nbytes: int
    fp16_nbytes: int

    def columns(self) -> tuple[str, ...]:
        """As text: cache, layers, bits of keys and values, megabytes, those in 16 bits, remark."""
        bits = "exact" if self.key_bits is None else f"K{self.key_bits} V{self.value_bits}"
        sizes = (f"{nbytes / 1e6:,.2f}" for nbytes in (self.nbytes, self.fp16_nbytes))
        return (self.cache, str(self.layers), bits, *sizes, self.remark)


class CacheReport(NamedTuple):
    """The size of a prompt cache, its layers by kind, and which have more bits than asked for."""

    size: CacheSize
    kinds: list[LayerKind]
    raised: list[str]

    @property
    def compressed_layers(self) -> int:
        """How many caches of layers are compressed."""
        return sum(kind.layers for kind in self.kinds if kind.key_bits is not None)

    def __str__(self) -> str:
        rows = [("cache", "layers", "bits", "MB", "MB in fp16", "")]
        rows += [kind.columns() for kind in self.kinds]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(
                cell.rjust(width) if index in (1, 3, 4) else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in rows
        ]
        lines += self.raised
        if not self.compressed_layers:
            lines.append("Nothing is compressed.")
        return "\n".join(lines)


def cache_size(cache: list[Any]) -> CacheSize:
    """Tokens and bytes of a prompt cache; layers that are not compressed count as they are."""
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


def bits_per_value(cache: list[Any]) -> float:
    """Bits that a value of one more packed token takes, scales included: of compressed layers."""
    layers = [layer for layer in flat_caches(cache) if hasattr(layer, "token_nbytes")]
    values = sum(layer.token_values for layer in layers)
    return 8 * sum(layer.token_nbytes for layer in layers) / max(values, 1)


def cache_report(cache: list[Any]) -> CacheReport:
    """What a prompt cache, a list of one cache per layer, holds; warns if nothing is compressed."""
    groups: dict[tuple, list[Any]] = {}
    for layer in flat_caches(cache):
        bits = getattr(layer, "key_bits", None), getattr(layer, "value_bits", None)
        groups.setdefault((type(layer).__name__, *bits), []).append(layer)
    kinds = [_kind(*key, layers) for key, layers in groups.items()]
    raised = [line for i, layer in enumerate(flat_caches(cache)) for line in _raised(i, layer)]
    report = CacheReport(cache_size(cache), kinds, raised)
    if not report.compressed_layers:
        names = ", ".join(kind.cache for kind in kinds) or "none"
        _log.warning("No layer of this cache is compressed (its caches: %s).", names)
    return report


def _kind(name: str, key_bits: int | None, value_bits: int | None, layers: list[Any]) -> LayerKind:
    if key_bits is None:
        remark = _WHY_NOT.get(name, "a kind that is left as it is")
    else:
        packed, exact = layers[-1].packed_tokens, layers[-1].exact_tokens
        remark = f"{packed:,} tokens a layer packed, {exact:,} exact"
    size = cache_size(layers)
    return LayerKind(name, len(layers), key_bits, value_bits, remark, size.nbytes, size.fp16_nbytes)


def _raised(index: int, layer: Any) -> list[str]:
    """Why keys and values of a layer have more bits than the fewest, or need more than eight."""
    if getattr(layer, "demands", None) is None:
        return []
    limits, demands, stores = layer.limits, layer.demands, layer._packed
    sides = (
        ("keys", "divergence of the weights", limits.key_bits, demands.keys, limits.keys),
        ("values", "error of the outputs", limits.value_bits, demands.values, limits.values),
    )
    lines = []
    for store, (side, what, least, demand, limit) in zip(stores, sides):
        if store.codes is None:
            continue
        dim, bits = store.mean.shape[-1], store.bits
        expected, remaining = (demand * relative_error(dim, b) for b in (least, bits))
        if bits > least:
            lines.append(
                f"layer {index}: {side} have {bits} bits, not {least}, at which the expected "
                f"{what} is {expected:.2g} and may be {limit:.2g}: "
                f"{store.nbytes_above(least) / 1e6:,.2f} MB more"
            )
        if remaining > limit:
            lines.append(
                f"layer {index}: {side} are not good enough at {bits} bits either: the expected "
                f"{what} is {remaining:.2g} and may be {limit:.2g}, so measure with "
                "`mlx_turboquant evaluate` whether this model can be compressed"
            )
    return lines


def flat_caches(cache: list[Any]) -> list[Any]:
    """The caches of all layers, those within a ``CacheList`` one by one."""
    return [part for layer in cache for part in getattr(layer, "caches", (layer,))]
