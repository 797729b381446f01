"""Prefixes for decoders that take a cache for single tokens only.

Some decoders (ProphetNet's) build their masks and relative positions for a whole text or for one more token, never for
a text behind a cache. Such a decoder gets its text with `p` more tokens in front, whose own keys and values are
replaced by the prefix's in every layer, and whose results are cut off again. It costs the work for `p` tokens, and
nothing has to be known about masks or positions.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import ModelOutput

from .cache import PrefixedLayer


class SlotLayer(PrefixedLayer):
    """One cache layer for a text whose first `p` tokens are slots for the prefix."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PrefixedLayer.update`, for keys and values of slots and text, `(batch, H, p + tokens, D)`."""
        return super().update(key_states[:, :, self.length :], value_states[:, :, self.length :], *args, **kwargs)

    def get_seq_length(self) -> int:
        """Nothing is cached yet: the slots are in the text."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys, slots included."""
        return query_length, 0


def with_slots(arguments: dict[str, Any], p: int, there: torch.Tensor | None = None) -> dict[str, Any]:
    """A decoder's arguments with `p` tokens in front of the text; which ones does not matter.

    Args:
        arguments: The arguments by name.
        p: Number of slots.
        there: Which slots each row sees, `(batch, p)`; `None` for all.
    """
    result = dict(arguments)
    for name in ("input_ids", "inputs_embeds"):
        text = arguments.get(name)
        if text is not None:
            result[name] = torch.cat([text[:, :1].expand(-1, p, *text.shape[2:]), text], dim=1)
            shape = text.shape[:2]
    mask = arguments.get("attention_mask")
    if mask is None and there is not None:
        mask = torch.ones(shape, dtype=torch.long, device=there.device)
    if mask is not None:
        own = mask.new_ones(mask.shape[0], p) if there is None else there.to(mask)
        result["attention_mask"] = torch.cat([own, mask], dim=1)
    return result


def without_slots(output: Any, p: int, length: int) -> Any:
    """A decoder's output with the results for the slots cut off.

    Args:
        output: One tensor, or any structure of them.
        p: Number of slots.
        length: Length of the text.
    """
    if isinstance(output, ModelOutput):
        return type(output)(**{name: without_slots(value, p, length) for name, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(without_slots(value, p, length) for value in output)
    if not isinstance(output, torch.Tensor):
        return output
    tokens = p + length
    if output.dim() == 3 and output.shape[1] % tokens == 0:  # hidden states, of several streams behind each other
        return output.unflatten(1, (-1, tokens))[:, :, p:].flatten(1, 2)
    return output[..., p:, :] if output.dim() >= 4 and output.shape[-2] == tokens else output  # attention weights
