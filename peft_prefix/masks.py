"""Attention masks of a model with a prefix: the model's own masks with `p` visible columns in front.

What real tokens see of each other is the model's business (causality, padding, windows, chunks, packed sequences) and
is taken from the model unchanged. The prefix adds columns that every token sees.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .cache import RowOrder
from .errors import PrefixInputError

Mask: TypeAlias = torch.Tensor | BlockMask | None
"""2D padding mask `(batch, seen + new)`, 4D mask `(batch, heads, new, keys)`, flex block mask, or none needed."""


def model_masks(
    base: PreTrainedModel,
    attention_mask: torch.Tensor | None,
    past: Cache | None,
    position_ids: torch.Tensor | None,
    new_tokens: torch.Tensor,
) -> Mask | dict[str, Mask]:
    """The masks that the base would build for real tokens alone, one or a dict by layer type.

    Args:
        base: The base model.
        attention_mask: 2D padding mask of real tokens, or `None`.
        past: Cache of real tokens, or `None`.
        position_ids: Positions as the user gave them (packed sequences restart at 0), or `None`.
        new_tokens: The new tokens' ids `(batch, new)` or embeddings `(batch, new, hidden)`; only the shape is read.

    Returns:
        Whatever the base's mask function returns.
    """
    create = getattr(base, "create_masks_for_generate", create_masks_for_generate)
    shape_only = torch.empty((*new_tokens.shape[:2], 0), dtype=base.dtype, device=new_tokens.device)
    masks: Mask | dict[str, Mask] = create(
        config=base.config,
        inputs_embeds=shape_only,
        attention_mask=attention_mask,
        past_key_values=past,
        position_ids=position_ids,
    )
    return masks


def with_prefix_columns(
    mask: Mask | dict[str, Mask],
    num_virtual_tokens: int,
    new_tokens: torch.Tensor,
    past: Cache | None,
    order: RowOrder | None = None,
) -> Mask | dict[str, Mask]:
    """A mask of real tokens with `p` visible columns for the prefix.

    Args:
        mask: 2D, 4D (boolean or additive) or block mask, `None` for "plainly causal" (as the scaled-dot-product kernel
            understands it), or a dict of them by layer type.
        num_virtual_tokens: Length `p` of the prefix.
        new_tokens: The new tokens' ids `(batch, new)` or embeddings `(batch, new, hidden)`; only the shape is read.
        past: Cache of real tokens, or `None`.
        order: Where each row's prefix goes if not to the front (2D masks only).

    Returns:
        The same kind of mask, `p` columns wider; boolean instead of `None`.

    Raises:
        PrefixInputError: A 4D mask that is neither boolean nor additive.
    """
    if isinstance(mask, dict):
        return {
            kind: _widened(_causal(kind, new_tokens, past) if part is None else part, num_virtual_tokens, order)
            for kind, part in mask.items()
        }
    if mask is None:
        mask = _causal("full_attention", new_tokens, past)
    return _widened(mask, num_virtual_tokens, order)


def leading_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of padding tokens before each row's first real token, `(batch,)`, from a 2D mask."""
    return (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1)


def positions_of_real_tokens(attention_mask: torch.Tensor, new_length: int) -> torch.Tensor:
    """Positions `(batch, new)` that count real tokens only, so that padding moves nothing."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -new_length:]


def _widened(mask: torch.Tensor | BlockMask, p: int, order: RowOrder | None) -> torch.Tensor | BlockMask:
    if isinstance(mask, BlockMask):
        return _widened_block_mask(mask, p)
    if mask.dim() == 2:
        wide = torch.cat([mask.new_ones(mask.shape[0], p), mask], dim=-1)
        return wide if order is None else wide.gather(1, order.indices(wide.shape[1]).to(wide.device))
    if mask.dtype == torch.bool:
        return torch.nn.functional.pad(mask, (p, 0), value=True)
    if mask.is_floating_point():
        return torch.nn.functional.pad(mask, (p, 0), value=0.0)
    raise PrefixInputError(
        f"A 4D attention mask must be boolean (True: visible) or floating point (added to the scores), not "
        f"{mask.dtype}. Convert it, e.g. mask.bool()."
    )


def _widened_block_mask(mask: BlockMask, p: int) -> BlockMask:
    real_tokens = mask.mask_mod

    def with_prefix(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key < p) | real_tokens(batch, head, query, (key - p).clamp(min=0))

    batch, heads, query_length, key_length = mask.shape
    return create_block_mask(with_prefix, batch, heads, query_length, p + key_length, device=mask.kv_num_blocks.device)


def _causal(kind: str, new_tokens: torch.Tensor, past: Cache | None) -> torch.Tensor:
    """The boolean form of a "plainly causal" mask, which the kernel would align wrongly once there are more keys."""
    new_length = new_tokens.shape[1]
    keys = new_length
    if past is not None:
        windowed = [index for index, sliding in enumerate(past.is_sliding) if sliding == (kind != "full_attention")]
        keys = past.get_mask_sizes(new_length, windowed[0] if windowed else 0)[0]
    mask = torch.ones(1, 1, new_length, keys, dtype=torch.bool, device=new_tokens.device)
    return mask if new_length == 1 else mask.tril()
