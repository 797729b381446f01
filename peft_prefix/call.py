"""One call of the base model with a prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import Cache, EncoderDecoderCache

from .cache import KeyValue, PrefixedLayer
from .config import Sliding
from .ownership import Owner

SiteStates = Mapping[str, Sequence[KeyValue | None]]
"""The prefix's keys and values by site and layer."""


@dataclass
class PrefixCall:
    """One call of the base with a prefix.

    Args:
        states: The prefix's keys and values by site and layer, for a number of rows.
        length: Length `p` of the prefix.
        sites: Where it acts.
        owner: Identity of the prefix, to recognize caches and encodings that were made with it.
        sliding: What happens to it in decoder layers with a sliding window.
        padding_mask: The call's 2D mask of real tokens, if it has one.
        checkpointed: Whether layers will run again in the backward pass.
        read: Sites whose prefix was read by the time that the call ends.
        cache: What the text decoder was given in its last pass.
        replayed: Keys and values that a layer reads instead of those of `states` while it runs as a checkpoint.
    """

    states: Callable[[int], SiteStates]
    length: int
    sites: tuple[str, ...]
    owner: Owner
    sliding: Sliding = "pinned"
    padding_mask: torch.Tensor | None = None
    checkpointed: bool = False
    read: set[str] = field(default_factory=set)
    cache: Cache | None = None
    replayed: dict[tuple[str, int], KeyValue] = field(default_factory=dict)

    def prefix(self, site: str, index: int, rows: int) -> KeyValue:
        """Keys and values of one layer of a site."""
        states = self.replayed.get((site, index)) or self.states(rows)[site][index]
        assert states is not None
        return states

    def cache_for(self, takes_pair: bool, site: str) -> Callable[[torch.Tensor], Cache]:
        """What gives an attention layer the decoder's cache, as its model would hand it on."""

        def given(_: torch.Tensor) -> Cache:
            assert self.cache is not None
            if takes_pair or not isinstance(self.cache, EncoderDecoderCache):
                return self.cache
            return self.cache.self_attention_cache if site == "decoder" else self.cache.cross_attention_cache

        return given

    def replay(self, slot: tuple[str, int], states: KeyValue) -> None:
        """Let a layer read these keys and values from now on."""
        self.replayed[slot] = states
        site, index = slot
        cache = self.cache
        if site == "encoder" or cache is None:
            return
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache if site == "decoder" else cache.cross_attention_cache
        layer = cache.layers[index]
        assert isinstance(layer, PrefixedLayer)
        layer.prefix = states
