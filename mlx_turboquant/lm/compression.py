"""The compression of one model: its settings, plan of bits, weights and link to its caches."""

import copy
import logging
import sys
import threading
import weakref
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..cache.fetched import Link
from ..codec.basis import Basis
from .allocation import Layer
from .bit_plan import BitPlan
from .compressible import (
    ATTRIBUTE,
    check_compressible,
    compressed_caches,
    compressible_caches,
    link_caches,
)
from .hook import link_of, unlink
from .identity import Weights
from .profile import Profile, find_profile, fingerprints
from .sensitivity import key_sensitivities
from .settings import Settings

_MAKE_PROMPT_CACHE = mlx_lm_cache.make_prompt_cache.__code__
# Several threads may make caches of a model.
_lock = threading.RLock()

_log = logging.getLogger("mlx_turboquant")


class Compression:
    """How one model is compressed; :func:`.enable` replaces the whole object.

    Attributes:
        settings: Settings of the caches that mlx-lm makes; None if the model is not enabled.
        replaced: The ``make_cache`` attribute of the model before it was enabled, or None.
        given: The profile that a caller has given, which stays until another one is given.
        profile: ``given``, or the one in the user's cache folder when this object was made.
        compressible: The caches of the model that are compressed.
    """

    def __init__(
        self,
        model: nn.Module,
        before: "Compression | None" = None,
        settings: Settings | None = None,
        given: Profile | None = None,
    ):
        self._model = weakref.ref(model)
        self.settings = settings
        maker = model.__dict__.get("make_cache")
        owner = getattr(maker, "__self__", None)
        self.replaced = owner.replaced if isinstance(owner, Compression) else maker
        self.given = given
        self._weights: Weights | None = None
        self._link: Link | None = None
        self._plan: BitPlan | None = None
        if before is None:
            self.compressible = compressible_caches(model)
        else:
            self.compressible = before.compressible
            self.given = given or before.given
            self._weights, self._link = before._weights, before._link
        own = fingerprints(model)
        self.profile = self.given or find_profile(own)
        self._has_other_adapters = self.profile and self.profile.fingerprint != own[0]
        if self.profile is not None:
            layers = (self.profile.layers(self.compressible, mean) for mean in (True, False))
            self._plan = BitPlan(*layers)
            self._bases = self.profile.bases_of(self.compressible, _group_of(model))
        elif before is not None and before.profile is None and before.weights() is self._weights:
            self._plan = before._plan

    def __deepcopy__(self, memo: dict) -> "Compression":
        copied = copy.copy(self)
        # The copy of the model is not complete, and has no modules to be hooked.
        copied._model = weakref.ref(memo.get(id(self._model()), self._model()))
        copied._weights = copied._link = None
        copied.replaced = copy.deepcopy(self.replaced, memo)
        return copied

    def make_cache(self) -> list[Any]:
        """A prompt cache for mlx-lm, whose limit is taken from the caller's local variables."""
        caller = sys._getframe(1)
        is_mlx_lm = caller.f_code is _MAKE_PROMPT_CACHE
        limit = caller.f_locals["max_kv_size"] if is_mlx_lm else None
        settings = self.settings if limit is None else replace(self.settings, max_size=limit)
        return self.new_cache(settings)

    def new_cache(self, settings: Settings) -> list[Any]:
        """An empty prompt cache.

        Raises:
            ValueError: a budget that is too small, or no layer that could be compressed.
        """
        model = self._model()
        if model is None:
            raise ValueError("The model that was enabled is gone: enable its copy.")
        check_compressible(model, self.compressible)
        bits, bases = self.bits(settings), self.bases(settings)
        cache = compressed_caches(model, self.compressible, bits, settings, bases)
        self.connect(cache)
        return cache

    def bits(self, settings: Settings) -> list[tuple[int, int]]:
        """The bits of keys and values of every compressed cache.

        Raises:
            ValueError: the budget is too small.
        """
        if settings.is_fixed:
            return [settings.fixed_bits()] * len(self.compressible)
        bits = self.plan().bits(settings)
        if self._has_other_adapters:
            self._has_other_adapters = False  # warn only once
            _log.warning(
                "The model has adapters: bits follow the profile of the model without them."
            )
        return bits

    def bases(self, settings: Settings) -> list[Basis | None]:
        """The bases of the keys of every compressed cache, or an empty list."""
        return [] if self.profile is None or settings.is_fixed else self._bases

    def plan(self) -> BitPlan:
        """The plan for bits that are not fixed; without a profile, the model runs for it once."""
        with _lock:
            if self._plan is None:
                sensitivities = key_sensitivities(self._model(), self.compressible)
                self._plan = BitPlan.estimated(self.compressible, sensitivities)
        return self._plan

    @property
    def expected(self) -> list[Layer] | None:
        """The compressed layers with the divergences to expect, or None without a profile."""
        return None if self._plan is None else self._plan.expected

    def weights(self) -> Weights:
        """The current weights of the model; if they have changed, the link is dropped."""
        with _lock:
            model = self._model()
            if self._weights is None or not self._weights.are_of(model):
                self._weights = Weights(model)
                self.disconnect()
            return self._weights

    def connect(self, cache: list[Any]) -> None:
        """Let attention read the compressed tokens of a cache that the current weights fill."""
        with _lock:
            weights = self.weights()
            if self._link is None:
                self._link = link_of(self._model(), self.compressible)
                self._link.weights = weights
            link_caches(cache, self._link)

    def disconnect(self) -> None:
        """Restore mlx-lm's attention in the model; its caches then return arrays."""
        with _lock:
            if self._link is not None:
                unlink(self._model(), self._link)
                self._link = None


def _group_of(model: nn.Module) -> mx.distributed.Group | None:
    """The machines that share the heads of a model, if there are several."""
    groups = (getattr(module, "group", None) for module in model.modules())
    return next((group for group in groups if isinstance(group, mx.distributed.Group)), None)


def known_compression(model: nn.Module) -> Compression | None:
    """The compression of a model, or None; a shallow copy's attribute is that of its original."""
    compression = getattr(model, ATTRIBUTE, None)
    return compression if compression is not None and compression._model() is model else None


def compression_of(model: nn.Module) -> Compression:
    """The compression of a model, which is made if needed; the model need not be enabled."""
    with _lock:
        compression = known_compression(model)
        if compression is None:
            compression = Compression(model)
            setattr(model, ATTRIBUTE, compression)
        return compression


def give_profile(model: nn.Module, profile: Profile) -> Compression:
    """Allocate the bits of a model by a profile, until another one is given.

    Raises:
        ValueError: the profile and the model have different layers.
    """
    with _lock:
        before = compression_of(model)
        compression = Compression(model, before, before.settings, profile)
        if before.settings is not None:
            model.make_cache = compression.make_cache
        setattr(model, ATTRIBUTE, compression)
        return compression


def treat_layers_alike(model: nn.Module) -> None:
    """Give a model without weights a plan of bits, for which the model does not run."""
    compression = compression_of(model)
    layers = compression.compressible
    compression._plan = BitPlan.estimated(layers, [0.0] * len(layers))
