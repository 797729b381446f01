"""The prefix as a model sees it: the first `p` entries of its key/value cache.

A `PrefixedCache` lives for one forward pass. It stands before the user's own cache (or before none at all) and answers
every question of the model with the prefix included, while the user's cache holds real tokens only. So every cache
class of transformers works underneath, generation never meets the prefix, and cropping, reordering for beams,
quantizing or offloading touch real tokens alone. Without a cache underneath nothing is stored, which makes a layer
safe to run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from .errors import PrefixInputError
from .recurrent import RecurrentPart, UnstoredLayer
from .room import grown, may_grow_in_place

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
        self._known: tuple[int, torch.Tensor] | None = None  # no dict: lengths may be symbols in traced code

    def indices(self, length: int) -> torch.Tensor:
        """For each row, which entry of "prefix, padding, text" comes where; shape `(batch, length)`."""
        if self._known is None or self._known[0] != length:
            p, pad = self.num_virtual_tokens, self.left_padding
            place = torch.arange(length, device=pad.device)[None, :]
            indices = torch.where(place < pad, place + p, torch.where(place < pad + p, place - pad, place))
            self._known = (length, indices)
        return self._known[1]

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Reorder keys or values of shape `(batch, H, length, D)`."""
        batch, heads, length, width = states.shape
        indices = self.indices(length).to(states.device)
        return states.gather(2, indices[:, None, :, None].expand(batch, heads, length, width))


class PrefixedLayer(CacheLayerMixin):
    """One cache layer with the prefix in front.

    Args:
        prefix: The layer's prefix, or `None` to add nothing.
        past: The cache of real tokens underneath, or `None` to store nothing.
        index: The layer's place in `past`.
        order: Where each row's prefix goes if not to the front.
        on_read: Called whenever the prefix is read.
    """

    def __init__(
        self,
        prefix: KeyValue | None,
        past: Cache | None,
        index: int,
        order: RowOrder | None = None,
        on_read: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        self.on_read = on_read
        self.prefix = prefix
        self.length = 0 if prefix is None else prefix[0].shape[-2]
        self.past = past
        self.index = index
        self.order = order
        self.consumed = prefix is None
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
        growing = self._growing_layer()
        new = (key_states, value_states)
        if self.prefix is not None and growing is not None and may_grow_in_place(growing, self.prefix, new):
            keys, values = grown(growing, self.prefix, new)
            self._note_reading()
        elif self.prefix is not None and growing is not None and growing.keys is not None:
            assert growing.values is not None
            # Its concatenation and ours are one and the same copy.
            keys, values = self._joined((growing.keys, key_states), (growing.values, value_states))
            growing.keys, growing.values = keys[:, :, self.length :], values[:, :, self.length :]
        else:
            if self.past is not None:
                key_states, value_states = self.past.update(key_states, value_states, self.index, *args, **kwargs)
            keys, values = self._joined((key_states,), (value_states,))
        if self.order is not None:
            keys, values = self.order.apply(keys), self.order.apply(values)
        return keys, values

    def _joined(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> KeyValue:
        """Real keys and values behind the prefix."""
        self._note_reading()
        if self.prefix is None:
            return keys[0], values[0]
        own_keys = self.prefix[0].to(keys[0]).expand(keys[0].shape[0], -1, -1, -1)
        own_values = self.prefix[1].to(values[0]).expand(values[0].shape[0], -1, -1, -1)
        return torch.cat([own_keys, *keys], dim=-2), torch.cat([own_values, *values], dim=-2)

    def _note_reading(self) -> None:
        self.consumed = True
        if self.on_read is not None:
            self.on_read()

    def _growing_layer(self) -> DynamicLayer | None:
        """The layer underneath, if it does nothing but grow and holds something already."""
        if self.past is None or self.past.offloading or self.index >= len(self.past.layers):
            return None
        layer = self.past.layers[self.index]
        return layer if type(layer) is DynamicLayer and layer.get_seq_length() > 0 else None

    def get_seq_length(self) -> int:
        """Number of cached entries, the prefix included: the position of the next real token."""
        seen = 0 if self.past is None else self.past.get_seq_length(self.index)
        return self.length + seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return for this many new tokens."""
        length, offset = (query_length, 0) if self.past is None else self.past.get_mask_sizes(query_length, self.index)
        return self.length + length, offset

    def get_max_length(self) -> int:
        """Capacity of the layer, `-1` if it grows."""
        capacity = -1 if self.past is None else self.past.get_max_length(self.index)
        return capacity if capacity < 0 else self.length + capacity


class PrefixedRecurrentLayer(PrefixedLayer, RecurrentPart):  # type: ignore[misc, override]
    """A layer that has keys and values and a recurrent state side by side; the prefix joins the former."""


class PrefixedCache(Cache):
    """A prefix in front of a cache, for one forward pass.

    Args:
        prefix: The keys and values of the prefix, layer by layer; `None` where a layer has none, or for no prefix.
        past: The user's cache of real tokens, or `None` to store nothing.
        blank: Empty layers of the base's own cache, one for each layer: what stands where a layer keeps no keys and
            values and nothing is stored.
        order: Where each row's prefix goes if not to the front.
        layer_type: Class of the layers that are not recurrent.

    Raises:
        PrefixInputError: `past` lacks layers that hold a recurrent state.
    """

    def __init__(
        self,
        prefix: Sequence[KeyValue | None],
        past: Cache | None,
        blank: Sequence[Any] = (),
        order: RowOrder | None = None,
        layer_type: type[PrefixedLayer] = PrefixedLayer,
    ) -> None:
        self.past = past
        self.prefixed: list[PrefixedLayer] = []
        layers: list[Any] = []
        for index, states in enumerate(prefix):
            own = blank[index] if index < len(blank) else None
            if own is not None and not isinstance(own, CacheLayerMixin):
                layers.append(_without_keys(own, past, index))
                continue
            layer = layer_type(states, past, index, order)
            if issubclass(type(own), LinearAttentionCacheLayerMixin):
                layer = PrefixedRecurrentLayer(states, past, index, order)
                layer.state = _without_keys(own, past, index)
            layers.append(layer)
            self.prefixed.append(layer)
        super().__init__(layers=layers)

    def unread_layers(self) -> list[int]:
        """Layers whose prefix the model has not read."""
        return [layer.index for layer in self.prefixed if not layer.consumed]


def _without_keys(own: Any, past: Cache | None, index: int) -> Any:
    """The part of a layer that keeps no keys and values: the user's own, or one that stores nothing."""
    if past is not None and index < len(past.layers):
        return past.layers[index]
    if not isinstance(own, LinearAttentionCacheLayerMixin):
        return own
    if past is not None:
        raise PrefixInputError(
            f"The cache has no layer {index}, where this model keeps a recurrent state. Make it with "
            "DynamicCache(config=model.config)."
        )
    return UnstoredLayer(own)
