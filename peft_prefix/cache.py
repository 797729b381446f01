"""The prefix as a model sees it: the first `p` entries of its key/value cache.

A `PrefixedCache` lives for one forward pass. It stands before the user's own cache (or before none at all) and answers
every question of the model with the prefix included, while the user's cache holds real tokens only. So every cache
class of transformers works underneath, generation never meets the prefix, and cropping, reordering for beams,
quantizing or offloading touch real tokens alone. Without a cache underneath nothing is stored, which makes a layer
safe to run twice.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""One layer's prefix: keys `(1 or batch, H, p, Dk)` and values `(1 or batch, H, p, Dv)`."""


class RowOrder:
    """Puts each row's prefix directly before its first real token, behind the row's left padding.

    Models that know positions only by counting cache entries (ALiBi in MPT, for instance) would otherwise see a prefix
    that padding has pushed away from its text.

    Args:
        left_padding: Number of leading padding tokens of each row, shape `(batch,)`.
        num_virtual_tokens: Length of the prefix.
    """

    def __init__(self, left_padding: torch.Tensor, num_virtual_tokens: int) -> None:
        self.left_padding = left_padding[:, None]
        self.num_virtual_tokens = num_virtual_tokens
        self._indices: dict[int, torch.Tensor] = {}

    def indices(self, length: int) -> torch.Tensor:
        """For each row, which entry of "prefix, padding, text" comes where; shape `(batch, length)`."""
        if length not in self._indices:
            p, pad = self.num_virtual_tokens, self.left_padding
            place = torch.arange(length, device=pad.device)[None, :]
            self._indices[length] = torch.where(
                place < pad, place + p, torch.where(place < pad + p, place - pad, place)
            )
        return self._indices[length]

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Reorder keys or values of shape `(batch, H, length, D)`."""
        batch, heads, length, width = states.shape
        indices = self.indices(length).to(states.device)
        return states.gather(2, indices[:, None, :, None].expand(batch, heads, length, width))


class PrefixedLayer(CacheLayerMixin):
    """One cache layer with the prefix in front."""

    def __init__(self, prefix: KeyValue, past: Cache | None, index: int, order: RowOrder | None) -> None:
        super().__init__()
        self.prefix_keys, self.prefix_values = prefix
        self.past = past
        self.index = index
        self.order = order
        self.consumed = False
        self.is_initialized = True

    @property
    def is_sliding(self) -> bool:
        """False: the prefix stays visible at every distance, so the layer as a whole has no window."""
        return False

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether the cache underneath has a fixed size, so that masks must hide its unused entries."""
        return self.past is not None and self.past.is_compileable

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: the cache underneath looks after itself."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new real tokens underneath (if anything is), and return prefix, past and new ones together.

        Args:
            key_states: Keys of the new tokens, `(batch, H, tokens, Dk)`.
            value_states: Values of the new tokens, `(batch, H, tokens, Dv)`.
            *args: Passed on to the cache underneath.
            **kwargs: Passed on to the cache underneath.

        Returns:
            Keys and values that attention reads, `p` entries longer than without a prefix.
        """
        self.consumed = True
        keys = self.prefix_keys.to(key_states).expand(key_states.shape[0], -1, -1, -1)
        values = self.prefix_values.to(value_states).expand(value_states.shape[0], -1, -1, -1)
        growing = self._growing_layer()
        if growing is not None and growing.keys is not None and growing.values is not None:
            # Its concatenation and ours are one and the same copy.
            keys = torch.cat([keys, growing.keys, key_states], dim=-2)
            values = torch.cat([values, growing.values, value_states], dim=-2)
            p = self.prefix_keys.shape[-2]
            growing.keys, growing.values = keys[:, :, p:], values[:, :, p:]
        else:
            if self.past is not None:
                key_states, value_states = self.past.update(key_states, value_states, self.index, *args, **kwargs)
            keys = torch.cat([keys, key_states], dim=-2)
            values = torch.cat([values, value_states], dim=-2)
        if self.order is not None:
            keys, values = self.order.apply(keys), self.order.apply(values)
        return keys, values

    def _growing_layer(self) -> DynamicLayer | None:
        """The layer underneath, if it does nothing but grow and holds something already."""
        if self.past is None or self.past.offloading or self.index >= len(self.past.layers):
            return None
        layer = self.past.layers[self.index]
        return layer if type(layer) is DynamicLayer and layer.get_seq_length() > 0 else None

    def get_seq_length(self) -> int:
        """Number of cached entries, the prefix included: the position of the next real token."""
        seen = 0 if self.past is None else self.past.get_seq_length(self.index)
        return self.prefix_keys.shape[-2] + seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return for this many new tokens."""
        length, offset = (query_length, 0) if self.past is None else self.past.get_mask_sizes(query_length, self.index)
        return self.prefix_keys.shape[-2] + length, offset

    def get_max_length(self) -> int:
        """Capacity of the layer, `-1` if it grows."""
        capacity = -1 if self.past is None else self.past.get_max_length(self.index)
        return capacity if capacity < 0 else self.prefix_keys.shape[-2] + capacity


class PrefixedCache(Cache):
    """A prefix in front of a cache, for one forward pass.

    Args:
        prefix: The keys and values of the prefix, layer by layer.
        past: The user's cache of real tokens, or `None` to store nothing.
        order: Where each row's prefix goes if not to the front.
    """

    def __init__(self, prefix: list[KeyValue], past: Cache | None, order: RowOrder | None = None) -> None:
        layers = [PrefixedLayer(states, past, index, order) for index, states in enumerate(prefix)]
        super().__init__(layers=list(layers))
        self.prefixed = layers
        self.past = past

    def unread_layers(self) -> list[int]:
        """Layers whose prefix the model has not read."""
        return [layer.index for layer in self.prefixed if not layer.consumed]
