"""The one structural exception of the injection: windows that are fixed in a buffer.

Nearly every model builds its sliding windows as masks, where a prefix gets visible columns (`masks.py`). Some older
ones (GPT-Neo) keep them in a boolean buffer `bias` of shape `(1, 1, positions, positions)`, indexed by cache entry. To
keep the prefix visible there, the prefix's columns of that buffer are set while the prefix is in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

_BUFFERS = threading.RLock()
"""Held while buffers are changed: they belong to the model, whichever thread runs it."""


class LocalWindows:
    """The attention modules of a base model whose causal mask is a buffer (none, for most models)."""

    def __init__(self, base: nn.Module) -> None:
        self.modules = [module for module in base.modules() if _has_mask_buffer(module)]
        self._opened: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @contextmanager
    def opened(self, num_virtual_tokens: int) -> Iterator[None]:
        """While this is open, every token sees the first `num_virtual_tokens` cache entries in these modules."""
        if not self.modules:
            yield
            return
        with _BUFFERS:
            yield from self._swapped(num_virtual_tokens)

    def _swapped(self, num_virtual_tokens: int) -> Iterator[None]:
        originals = [cast("torch.Tensor", module.bias) for module in self.modules]
        self._assign(self._buffers(originals, num_virtual_tokens))
        try:
            yield
        finally:
            self._assign(originals)

    def _assign(self, buffers: list[torch.Tensor]) -> None:
        for module, buffer in zip(self.modules, buffers, strict=True):
            module.bias = buffer

    def _buffers(self, originals: list[torch.Tensor], p: int) -> list[torch.Tensor]:
        """Opened copies, made once for each length and again when the model was moved."""
        known = self._opened.get(p)
        if known is None or any(source is not original for (source, _), original in zip(known, originals, strict=True)):
            known = [(original, _with_visible_columns(original, p)) for original in originals]
            self._opened[p] = known
        return [copy for _, copy in known]


def _has_mask_buffer(module: nn.Module) -> bool:
    buffer = dict(module.named_buffers(recurse=False)).get("bias")
    return buffer is not None and buffer.dtype == torch.bool and buffer.dim() == 4


def _with_visible_columns(buffer: torch.Tensor, p: int) -> torch.Tensor:
    copy = buffer.clone()
    copy[..., p:, :p] = True
    return copy
