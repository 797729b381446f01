"""Layers of hybrid models: what a prefix does not touch, a recurrent or convolution state, passed through.

The prefix acts where there are keys and values. A layer that keeps only a recurrent state is the user's own cache
layer, or, when nothing is stored, one that forgets; a layer that keeps both gets the prefix for its keys and values.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin


class UnstoredLayer(LinearAttentionCacheLayerMixin):
    """A recurrent layer of a cache that stores nothing: every pass starts from the beginning, and may run twice.

    Args:
        blank: An untouched layer of the base's own kind, which knows how to shape what a pass returns.
    """

    def __init__(self, blank: Any) -> None:
        self._blank = blank
        self.__dict__.update(vars(copy.deepcopy(blank)))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to allocate."""

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a first pass with a cache would return."""
        states: torch.Tensor = copy.deepcopy(self._blank).update_conv_state(conv_states, *args, **kwargs)
        return states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The states as they come."""
        return recurrent_states


class RecurrentPart(LinearAttentionCacheLayerMixin):
    """Mix-in for a cache layer whose recurrent state is kept by another layer, `state`."""

    state: Any

    def __getattr__(self, name: str) -> Any:
        # Only what this layer does not know itself: conv_states, recurrent_states, has_previous_state, ...
        if name == "state":
            raise AttributeError(name)
        return getattr(self.state, name)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer that keeps the state."""
        states: torch.Tensor = self.state.update_conv_state(*args, **kwargs)
        return states

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the layer that keeps the state."""
        states: torch.Tensor = self.state.update_recurrent_state(*args, **kwargs)
        return states
