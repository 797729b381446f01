"""Room for a growing cache with a prefix in front, so that a decoding step writes its token instead of copying all.

The ordinary growing cache of transformers copies all keys and values at every step. With a prefix in front there would
be more to copy. So both stand in one tensor that is somewhat longer than needed; the user's cache shows the part with
the real tokens. What is shown is never written again: only a cache that shows everything may grow in place, and a copy
of it that goes on by itself gets room of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.cache_utils import DynamicLayer

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""One layer's keys and values, each `(batch, H, entries, D)`."""

_places: Any = WeakTensorKeyDictionary()
"""For the tensors that a cache shows: the room that they are a part of, and how far it was filled then."""


class Room:
    """Keys and values of a prefix and of the real tokens behind it.

    Args:
        prefix: The prefix, `(1 or batch, H, p, D)`.
        states: Real tokens, one part after the other, `(batch, H, tokens, D)`.
        slack: How many more tokens there shall be room for.
    """

    def __init__(self, prefix: KeyValue, states: list[KeyValue], slack: int) -> None:
        self.prefix = prefix
        self.version = _version(prefix)
        self.filled = self.p = prefix[0].shape[-2]
        length = self.p + sum(keys.shape[-2] for keys, _ in states) + slack
        self.tensors = tuple(like.new_empty(*like.shape[:2], length, like.shape[3]) for like in states[0])
        for tensor, own in zip(self.tensors, prefix, strict=True):
            tensor[:, :, : self.p] = own
        for part in states:
            self.add(part)

    def fits(self, prefix: KeyValue, new: KeyValue) -> bool:
        """Whether there is room for new tokens, and they may be written."""
        room = self.tensors[0]
        same = all(one.data_ptr() == own.data_ptr() for one, own in zip(prefix, self.prefix, strict=True))
        return (
            (prefix is self.prefix or (same and _version(prefix) == self.version is not None))
            and self.filled + new[0].shape[-2] <= room.shape[-2]
            and (torch.is_inference_mode_enabled() or not room.is_inference())
        )

    def add(self, new: KeyValue) -> None:
        """Write new tokens behind the others."""
        end = self.filled + new[0].shape[-2]
        for tensor, states in zip(self.tensors, new, strict=True):
            tensor[:, :, self.filled : end] = states
        self.filled = end

    def everything(self) -> KeyValue:
        """Prefix and real tokens, as attention reads them."""
        keys, values = (tensor[:, :, : self.filled] for tensor in self.tensors)
        return keys, values

    def real_tokens(self) -> KeyValue:
        """What the user's cache shows."""
        keys, values = (tensor[:, :, self.p : self.filled] for tensor in self.tensors)
        for shown in (keys, values):
            _places[shown] = (self, self.filled)  # by the tensors, so that the room goes when they go
        return keys, values


def grown(layer: DynamicLayer, prefix: KeyValue, new: KeyValue) -> KeyValue:
    """Add new tokens to the user's layer, and give the prefix and all tokens together.

    Args:
        layer: A growing layer that holds something already.
        prefix: The prefix, `(1 or batch, H, p, D)`.
        new: Keys and values of the new tokens, `(batch, H, tokens, D)`.
    """
    assert layer.keys is not None
    assert layer.values is not None
    room = _room_behind(layer.keys, layer.values)
    if room is not None and room.fits(prefix, new):
        room.add(new)
    else:
        room = Room(prefix, [(layer.keys, layer.values), new], slack=64 + layer.keys.shape[-2] // 8)
    layer.keys, layer.values = room.real_tokens()
    return room.everything()


def may_grow_in_place(layer: DynamicLayer, prefix: KeyValue, new: KeyValue) -> bool:
    """Whether new tokens are of the layer's kind, nothing will ask for gradients, and nothing traces the code."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(states.requires_grad for states in (*prefix, *new)):
        return False
    assert layer.keys is not None
    assert layer.values is not None
    pairs = zip((layer.keys, layer.values), new, strict=True)
    # Others are joined, or refused, as the base does it.
    return all(_kind(one) == _kind(other) for one, other in pairs)


def _room_behind(keys: torch.Tensor, values: torch.Tensor) -> Room | None:
    """The room that a cache shows up to its end; what another cache has written behind that must stay."""
    place: tuple[Room, int] | None = _places.get(keys)
    if place is None or place != _places.get(values):
        return None
    room, filled = place
    return room if room.filled == filled else None


def _kind(states: torch.Tensor) -> tuple[Any, ...]:
    return states.dtype, states.device, states.shape[:2], states.shape[3]


def _version(prefix: KeyValue) -> tuple[int, ...] | None:
    """Which numbers a prefix holds, if that can be told; a network makes new tensors each time."""
    return None if any(one.is_inference() for one in prefix) else tuple(one._version for one in prefix)
