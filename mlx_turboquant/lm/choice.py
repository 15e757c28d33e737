"""The bits of the layers of one model, chosen by its profile or by what stands in for one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.nn as nn

from ..codec.codebook import relative_error
from .allocation import BUDGETS, Layer, allocate, expected_divergence, measured_layer, uniform_bits
from .compressible import Compressible, compressible_caches
from .demands import key_demands
from .profile import Profile, find_profile, fingerprint
from .settings import Settings

# What keys cost without a profile if values cost 1: this factor times the demand of their layer, or
# at least the second number. Both were chosen on three real models, see docs/quality.md.
_KEY_WEIGHT_OF_DEMAND, _LEAST_KEY_WEIGHT = 2.0, 4.0
# In nats; a model with a larger divergence says other things.
_LARGE_DIVERGENCE = 0.05
_ATTRIBUTE = "_mlx_turboquant_choice"

_log = logging.getLogger("mlx_turboquant")


@dataclass
class ModelChoice:
    """The layers of a model as bits are chosen by, and the bits that were chosen so far.

    ``weighed`` are the layers with the divergences that decide. ``expected`` are the same layers
    with the divergences to expect, in nats, or None without a profile.
    """

    compressible: list[Compressible]
    weighed: list[Layer]
    expected: list[Layer] | None
    _chosen: dict[Settings, list[tuple[int, int]]] = field(default_factory=dict)

    def bits(self, settings: Settings) -> list[tuple[int, int]]:
        """The bits of keys and values of every layer for a budget.

        Raises:
            ValueError: the budget is too small.
        """
        if settings.is_fixed:
            key_bits, value_bits = uniform_bits(settings.bits)
            pair = (settings.key_bits or key_bits, settings.value_bits or value_bits)
            return [pair] * len(self.compressible)
        if settings in self._chosen:
            return self._chosen[settings]
        bits = allocate(self.weighed, settings.bits, settings.key_bits, settings.value_bits)
        divergence = self.divergence(bits)
        if divergence is None:
            _log.info(
                "This model has no profile: `mlx_turboquant calibrate` would measure where bits "
                "matter, which lowers the divergence by a third and more at the same size."
            )
        elif divergence > _LARGE_DIVERGENCE:
            text = "With %g bits the expected divergence is %.2g nats: use %s."
            _log.warning(text, settings.bits, divergence, self._remedy())
        self._chosen[settings] = bits
        return bits

    def divergence(self, bits: Sequence[tuple[int, int]]) -> float | None:
        """The divergence to expect with these bits, in nats; None without a profile."""
        return None if self.expected is None else expected_divergence(self.expected, bits)

    def _remedy(self) -> str:
        for budget in BUDGETS:
            if self.divergence(allocate(self.weighed, budget)) <= _LARGE_DIVERGENCE:
                return f"{budget:g} bits to stay below {_LARGE_DIVERGENCE}"
        return "mlx_turboquant evaluate to see whether this model can be compressed"


def choice_of(model: nn.Module, profile: Profile | None = None) -> ModelChoice:
    """The choice of bits for a model, which keeps it; a ``profile`` replaces it by a new one.

    Raises:
        ValueError: the profile and the model have different numbers of layers.
    """
    known = getattr(model, _ATTRIBUTE, None)
    if known is not None and profile is None:
        return known
    compressible = compressible_caches(model)
    profile = profile or find_profile(fingerprint(model))
    if profile is None:
        demands = key_demands(model, compressible) if compressible else []
        choice = ModelChoice(compressible, _weighed_by_demand(compressible, demands), None)
    else:
        layers = (profile.layers(compressible, geometric) for geometric in (True, False))
        choice = ModelChoice(compressible, *layers)
    setattr(model, _ATTRIBUTE, choice)
    return choice


def treat_layers_alike(model: nn.Module) -> None:
    """Give a model without weights a choice of bits, for which nothing is computed with it."""
    compressible = compressible_caches(model)
    weighed = _weighed_by_demand(compressible, [0.0] * len(compressible))
    setattr(model, _ATTRIBUTE, ModelChoice(compressible, weighed, None))


def _weighed_by_demand(compressible: list[Compressible], demands: list[float]) -> list[Layer]:
    layers = []
    for place, demand in zip(compressible, demands):
        # Not max(): a demand that is not a number says nothing.
        weight = _KEY_WEIGHT_OF_DEMAND * demand
        weight = weight if weight > _LEAST_KEY_WEIGHT else _LEAST_KEY_WEIGHT
        keys, values = place.keys, place.values
        of_values = None if values is None else {1: relative_error(values.dim, 1)}
        of_keys = {1: weight * relative_error(keys.dim, 1)}
        layers.append(measured_layer(keys, values, of_keys, of_values))
    return layers
