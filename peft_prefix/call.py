"""One call of the base model with a prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .cache import KeyValue
from .config import Sliding

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
        read: Sites whose prefix was read by the time that the call ends.
    """

    states: Callable[[int], SiteStates]
    length: int
    sites: tuple[str, ...]
    owner: str
    sliding: Sliding = "pinned"
    padding_mask: torch.Tensor | None = None
    read: set[str] = field(default_factory=set)
