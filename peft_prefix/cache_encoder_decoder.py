"""Prefixes in the caches of encoder-decoder models: in attention to the source, and in encoders, which have none."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache

from .cache import PrefixedCache, PrefixedLayer


class PrefixedCrossLayer(PrefixedLayer):
    """One layer of a cross-attention cache, which models fill once and then read without an update."""

    @property
    def keys(self) -> torch.Tensor | None:
        """What attention reads after the first token: the prefix and the stored keys, `(batch, H, p + source, Dk)`."""
        return self._stored()[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        """Set by the base class when it is made; keys are stored underneath."""

    @property
    def values(self) -> torch.Tensor | None:
        """As `keys`, `(batch, H, p + source, Dv)`."""
        return self._stored()[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        """See `keys`."""

    def _stored(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.past is None or self.index >= len(self.past.layers):
            return None, None
        layer: Any = self.past.layers[self.index]
        if layer.keys is None or layer.values is None:
            return None, None
        return self._joined((layer.keys,), (layer.values,))


class PrefixedEncoderDecoderCache(EncoderDecoderCache):
    """Prefixes in front of both caches of an encoder-decoder model, for one forward pass.

    Args:
        decoder: In front of the self-attention cache.
        cross: In front of the cross-attention cache.
        past: The user's cache of real tokens, or `None` to store nothing.
    """

    def __init__(self, decoder: PrefixedCache, cross: PrefixedCache, past: EncoderDecoderCache | None) -> None:
        self.self_attention_cache = decoder  # type: ignore[assignment]
        self.cross_attention_cache = cross  # type: ignore[assignment]
        self._prefixed = (decoder, cross)
        self.past = past
        # Which layers know the source already; shared, so that the user's cache knows it afterwards.
        self.is_updated = _NeverUpdated() if past is None else past.is_updated

    def unread_layers(self) -> list[int]:
        """Decoder layers whose prefix was not read in self-attention or cross-attention."""
        return sorted({layer for cache in self._prefixed for layer in cache.unread_layers()})


class _NeverUpdated(dict[int, bool]):
    """Nothing is stored, so that a layer that runs again computes the source's keys again."""

    def __setitem__(self, layer: int, is_updated: bool) -> None:
        pass


class SuppliedCache(Cache):
    """The cache of one attention module that its model never gives a cache, such as those of an encoder.

    Args:
        layer: What the module shall read; it stores nothing.
    """

    def __init__(self, layer: PrefixedLayer) -> None:
        super().__init__(layers=[layer])
        self._layer = layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int | None = None, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prefix before the keys `(batch, H, tokens, Dk)` and values, whatever index the module goes by."""
        return self._layer.update(key_states, value_states)

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Length of the prefix."""
        return self._layer.get_seq_length()
