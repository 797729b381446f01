"""Attention layers that a prefix reaches by their arguments, because their model gives them no cache of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .arguments import by_name
from .passes import Entered, Intervention

_MASK_NAMES = ("attention_mask", "mask")
"""What attention modules call their mask."""
_CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")
"""What they call their cache."""
_CROSS_MASK_NAMES = ("encoder_attention_mask", *_MASK_NAMES)
"""The same in attention to an encoder; where there is the first, the second belongs to self-attention."""


@dataclass(frozen=True)
class AttentionModule:
    """One attention layer that a prefix reaches by its arguments.

    Args:
        module: The module itself.
        names: Names of its forward's arguments, in order.
        mask: Name of the argument that holds its mask.
        cache: Name of the argument that holds its cache.
        index: Its layer in the cache.
        takes_pair: Whether its model hands it the caches of both kinds of attention in one.
    """

    module: nn.Module
    names: tuple[str, ...]
    mask: str
    cache: str
    index: int
    takes_pair: bool = False

    @classmethod
    def of(cls, module: nn.Module, index: int, *, is_cross: bool = False) -> AttentionModule | None:
        """Read the module's forward signature; `None` if it lacks a mask or a cache and so is no attention layer."""
        names = tuple(inspect.signature(module.forward).parameters)
        masks = [name for name in (_CROSS_MASK_NAMES if is_cross else _MASK_NAMES) if name in names]
        caches = [name for name in _CACHE_NAMES if name in names]
        return cls(module, names, masks[0], caches[0], index) if masks and caches else None

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of one call by name."""
        return by_name(self.names, args, kwargs)


def supply(
    attention: AttentionModule,
    cache: Callable[[torch.Tensor], Cache] | None,
    mask: Callable[[Any, torch.Tensor], Any] | None,
) -> Intervention:
    """Give an attention module a mask of ours, and a cache where its model gives it none.

    Args:
        attention: The module.
        cache: Makes the cache for one pass, from its hidden states `(batch, tokens, hidden)`; `None` to leave it.
        mask: Changes the pass's mask, which may be `None`, given the hidden states, too; left out, it stays.
    """

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        arguments = attention.named(args, kwargs)
        hidden_states = arguments[attention.names[0]]
        if cache is not None:
            arguments[attention.cache] = cache(hidden_states)
        if mask is not None:
            arguments[attention.mask] = mask(arguments.get(attention.mask), hidden_states)
        return arguments, None

    return Intervention(attention.module, enter)
