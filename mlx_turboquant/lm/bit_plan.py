"""The plan of bits of one model: by its profile, or by an estimate without one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..codec.codebook import relative_error
from .allocation import BUDGETS, Layer, allocate, expected_divergence, measured_layer
from .compressible import Compressible
from .settings import Settings

# The weight of keys relative to values without a profile: the first number times the sensitivity of
# their layer, but at least the second. Both were chosen on three models, see docs/quality.md.
_KEY_WEIGHT, _LEAST_KEY_WEIGHT = 2.0, 4.0
# In nats: above this, the output differs noticeably.
_LARGE_DIVERGENCE = 0.05

_log = logging.getLogger("mlx_turboquant")


@dataclass
class BitPlan:
    """The compressed layers of a model, and the bits that have been chosen for them.

    ``layers`` have the divergences for allocation. ``expected`` are the same layers with the
    divergences to expect, in nats, or None without a profile. Both are those of scalar codes, with
    which profiles are measured.
    """

    layers: list[Layer]
    expected: list[Layer] | None
    _chosen: dict[Settings, list[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def estimated(
        cls, compressible: Sequence[Compressible], sensitivities: Sequence[float]
    ) -> "BitPlan":
        """The plan for a model without a profile, by the key sensitivity of each layer."""
        layers = []
        for place, sensitivity in zip(compressible, sensitivities):
            # Not max(), so that a sensitivity of NaN gives the least weight.
            weight = _KEY_WEIGHT * sensitivity
            weight = weight if weight > _LEAST_KEY_WEIGHT else _LEAST_KEY_WEIGHT
            keys, values = place.keys, place.values
            of_values = None if values is None else {1: relative_error(values.dim, 1)}
            of_keys = {1: weight * relative_error(keys.dim, 1)}
            layers.append(measured_layer(keys, values, of_keys, of_values))
        return cls(layers, None)

    def bits(self, settings: Settings) -> list[tuple[int, int]]:
        """The bits of keys and values of every layer for a budget.

        Raises:
            ValueError: the budget is too small.
        """
        if settings in self._chosen:
            return self._chosen[settings]
        plan = self._coded(settings.codec)
        bits = allocate(plan.layers, settings.bits, settings.key_bits, settings.value_bits)
        divergence = plan.divergence(bits)
        if divergence is None:
            _log.info(
                "This model has no profile: `mlx_turboquant calibrate` measures where bits matter, "
                "which lowers the divergence by a third or more at the same size."
            )
        elif divergence > _LARGE_DIVERGENCE:
            text = "With %g bits the expected divergence is %.2g nats: use %s."
            _log.warning(text, settings.bits, divergence, plan._remedy())
        self._chosen[settings] = bits
        return bits

    def divergence(self, bits: Sequence[tuple[int, int]]) -> float | None:
        """The divergence to expect with these bits, in nats; None without a profile."""
        return None if self.expected is None else expected_divergence(self.expected, bits)

    def _coded(self, codec: str) -> "BitPlan":
        """The plan for codes of ``codec``."""
        both = (self.layers, self.expected)
        return BitPlan(*(each and [layer.coded(codec) for layer in each] for each in both))

    def _remedy(self) -> str:
        for budget in BUDGETS:
            if self.divergence(allocate(self.layers, budget)) <= _LARGE_DIVERGENCE:
                return f"{budget:g} bits to stay below {_LARGE_DIVERGENCE}"
        return "mlx_turboquant evaluate to see whether this model can be compressed"
