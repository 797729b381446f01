"""Where generation must end because the base has no more positions: the prefix takes some of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import StoppingCriteria

from .errors import PrefixWarning
from .masks import leading_padding


class PositionsUsedUp(StoppingCriteria):
    """Stops all rows when the first one has used the base's last position, and keeps what was generated.

    Args:
        position_limit: Positions that the base has.
        num_virtual_tokens: Positions that the prefix takes.
        arguments: Arguments of `generate`: padding takes no positions, and embeddings are no ids.
    """

    def __init__(self, position_limit: int, num_virtual_tokens: int, arguments: Mapping[str, Any]) -> None:
        self.position_limit = position_limit
        self.num_virtual_tokens = num_virtual_tokens
        mask, embeddings = arguments.get("attention_mask"), arguments.get("inputs_embeds")
        self.columns = position_limit - num_virtual_tokens
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.columns += int(leading_padding(mask).min())
        if isinstance(embeddings, torch.Tensor) and arguments.get("input_ids") is None:
            self.columns -= embeddings.shape[1]
        self.max_length, self.max_new_tokens = arguments.get("max_length"), arguments.get("max_new_tokens")
        self.wanted: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Whether each row is to stop, `(batch,)`."""
        if self.wanted is None:  # after the first new token
            more = self.max_new_tokens
            self.wanted = self.max_length or 0 if more is None else input_ids.shape[1] - 1 + more
        is_full = input_ids.shape[1] >= self.columns
        if is_full and self.wanted != self.columns:
            warnings.warn(
                f"Generation stops: the base model has {self.position_limit} positions, and the prefix takes "
                f"{self.num_virtual_tokens} of them.",
                PrefixWarning,
                stacklevel=2,
            )
        return torch.full((input_ids.shape[0],), is_full, dtype=torch.bool, device=input_ids.device)
