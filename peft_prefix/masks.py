"""Attention masks of a model with a prefix: the model's own masks with `p` columns in front.

What real tokens see of each other is the model's business (causality, padding, windows, chunks, packed sequences) and
is taken from the model unchanged. The prefix adds columns that every token sees, or, with plain sliding windows, every
token that is near enough. Where rows have prefixes of different lengths, `p` is that of the longest; the others stand
at the end of their columns, directly before the text, and what is left at the beginning is hidden. In training single
columns may be hidden from single rows as well (`hidden_tokens.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as MASK_FUNCTIONS
from transformers.masking_utils import create_masks_for_generate, create_recurrent_attention_mask

from .cache import RowOrder
from .errors import PrefixInputError

Mask: TypeAlias = torch.Tensor | BlockMask | None
"""2D padding mask `(batch, seen + new)`, 4D mask `(batch, heads, new, keys)`, flex block mask, or none needed."""


@dataclass(frozen=True)
class PrefixColumns:
    """The columns of a prefix in the masks of one forward pass.

    Args:
        length: Length `p` of the prefix, the longest one if rows differ.
        order: Where each row's prefix goes if not to the front (2D masks only).
        lengths: Length of each row's prefix, `(batch,)`, where they differ.
        positions: For plain sliding windows, the positions of the new tokens, `(1 or batch, new)`, with each row's
            prefix at the first ones; `None` keeps the prefix visible at every distance.
        text_config: For plain sliding windows, the config that says how wide they are.
        pinned: Rows whose prefix stays visible all the same, `(batch,)`.
        hidden: Virtual tokens that a row does not see, `(batch, p)`. Positions do not depend on it.
    """

    length: int
    order: RowOrder | None = None
    lengths: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    text_config: Any = None
    pinned: torch.Tensor | None = None
    hidden: torch.Tensor | None = None

    @property
    def all_exist(self) -> bool:
        """Whether every row sees every column, so that no mask is needed for them."""
        return self.lengths is None and self.hidden is None

    def exists(self) -> torch.Tensor | None:
        """Which columns stand for a virtual token that the row sees, `(batch, p)`; `None` if all do."""
        seen = None if self.hidden is None else ~self.hidden
        if self.lengths is None:
            return seen
        place = torch.arange(self.length, device=self.lengths.device)
        there: torch.Tensor = place >= self.length - self.lengths[:, None]
        return there if seen is None else there & seen.to(there.device)

    def visible(self, kind: str) -> torch.Tensor | None:
        """Which columns each new token sees in layers of a kind, `(1 or batch, 1, 1 or new, p)`; `None` for all."""
        exists = self.exists()
        there = None if exists is None else exists[:, None, None, :]
        near = self._near(kind)
        if near is None or there is None:
            return there if near is None else near
        return near & there

    def _near(self, kind: str) -> torch.Tensor | None:
        """Which columns are near enough to each new token; `None` for all."""
        if self.positions is None or kind not in ("sliding_attention", "chunked_attention"):
            return None
        own = torch.arange(self.length, device=self.positions.device)[None, :]
        lengths: torch.Tensor | int = self.length
        if self.lengths is not None:
            own, lengths = own + self.lengths[:, None] - self.length, self.lengths[:, None, None, None]
        queries = self.positions[:, None, :, None]
        if kind == "sliding_attention":
            near: torch.Tensor = queries - own[:, None, None, :] < self.text_config.sliding_window
        else:  # chunks count real tokens; the prefix belongs to the first one
            near = (queries - lengths < self.text_config.attention_chunk_size).expand(-1, -1, -1, self.length)
        return near if self.pinned is None else near | self.pinned[:, None, None, None]


def model_masks(
    base: PreTrainedModel,
    text_config: Any,
    attention_mask: torch.Tensor | None,
    past: Cache | None,
    position_ids: torch.Tensor | None,
    new_tokens: torch.Tensor,
) -> Mask | dict[str, Mask]:
    """The masks that the base would build for real tokens alone, one or a dict by layer type.

    Args:
        base: The base model, whose class may have a mask function of its own.
        text_config: Config of its text decoder.
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
        config=text_config,
        inputs_embeds=shape_only,
        attention_mask=attention_mask,
        past_key_values=past,
        position_ids=position_ids,
    )
    return masks


def window_kind(text_config: Any) -> str:
    """The kind of layer that a model with one mask for all layers has."""
    if getattr(text_config, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(text_config, "attention_chunk_size", None) is None else "chunked_attention"


def with_prefix_columns(
    mask: Mask | dict[str, Mask],
    columns: PrefixColumns,
    new_tokens: torch.Tensor,
    past: Cache | None,
    kind: str = "full_attention",
) -> Mask | dict[str, Mask]:
    """A mask of real tokens with `p` columns for the prefix.

    Args:
        mask: 2D, 4D (boolean or additive) or block mask, `None` for "plainly causal" (as the scaled-dot-product kernel
            understands it), or a dict of them by layer type.
        columns: The prefix's columns.
        new_tokens: The new tokens' ids `(batch, new)` or embeddings `(batch, new, hidden)`; only the shape is read.
        past: Cache of real tokens, or `None`.
        kind: Type of the layers that a single mask is for.

    Returns:
        The same kind of mask, `p` columns wider; boolean instead of `None`. Masks of recurrent layers stay as they are.

    Raises:
        PrefixInputError: A 4D mask that is neither boolean nor additive.
    """
    if isinstance(mask, dict):
        return {
            name: part if _is_recurrent(name) else _with_columns(part, columns, new_tokens, past, name)
            for name, part in mask.items()
        }
    return _with_columns(mask, columns, new_tokens, past, kind)


def leading_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number of padding tokens before each row's first real token, `(batch,)`, from a 2D or 4D mask."""
    if attention_mask.dim() == 4:  # padding is what no token sees
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        attention_mask = seen.flatten(1, 2).any(dim=1)
    return (attention_mask.cumsum(dim=-1) == 0).sum(dim=-1)


def positions_of_real_tokens(attention_mask: torch.Tensor, new_length: int) -> torch.Tensor:
    """Positions `(batch, new)` that count real tokens only, so that padding moves nothing."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -new_length:]


def widened(
    mask: torch.Tensor | BlockMask, columns: PrefixColumns, kind: str = "full_attention"
) -> torch.Tensor | BlockMask:
    """One mask with the prefix's columns in front.

    Args:
        mask: 2D, 4D (boolean or additive) or block mask.
        columns: The prefix's columns.
        kind: Type of the layers that the mask is for.

    Raises:
        PrefixInputError: A 4D mask that is neither boolean nor additive.
    """
    p, visible = columns.length, columns.visible(kind)
    if isinstance(mask, BlockMask):
        return _widened_block_mask(mask, p, visible)
    if mask.dim() == 2:
        there = columns.exists()
        own = mask.new_ones(mask.shape[0], p) if there is None else there.to(mask)
        wide = torch.cat([own, mask], dim=-1)
        return wide if columns.order is None else wide.gather(1, columns.order.indices(wide.shape[1]).to(wide.device))
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise PrefixInputError(
            f"A 4D attention mask must be boolean (True: visible) or floating point (added to the scores), not "
            f"{mask.dtype}. Convert it, e.g. mask.bool()."
        )
    if visible is None:
        visible = torch.ones(1, 1, 1, p, dtype=torch.bool, device=mask.device)
    own = visible.to(mask.device)
    if mask.dtype != torch.bool:
        own = torch.zeros(own.shape, dtype=mask.dtype, device=mask.device).masked_fill(
            ~own, torch.finfo(mask.dtype).min
        )
    rows = max(mask.shape[0], own.shape[0])
    wide = torch.cat([own.expand(rows, *mask.shape[1:3], p), mask.expand(rows, *mask.shape[1:])], dim=-1)
    if columns.order is None:
        return wide
    indices = columns.order.indices(wide.shape[-1]).to(wide.device)[:, None, None, :]
    return wide.expand(indices.shape[0], -1, -1, -1).gather(3, indices.expand(-1, *wide.shape[1:3], -1))


class WideMasks:
    """Masks with the prefix's columns in attention to both sides, each made once although every layer asks for it.

    Args:
        implementation: The attention implementation of the layers.
    """

    def __init__(self, implementation: str | None = None) -> None:
        self.implementation = str(implementation)
        self._known: list[tuple[Any, PrefixColumns, tuple[int, int], Any]] = []

    def widened(self, mask: Any, columns: PrefixColumns, keys: int, states: torch.Tensor) -> Any:
        """A mask with the prefix's columns; `None`, which hides nothing, stays so where every row sees every column.

        Args:
            mask: What the layer got from its model.
            columns: The prefix's columns.
            keys: How many real keys there are.
            states: Hidden states `(batch, tokens, hidden)`, for their dtype and device.
        """
        if mask is None and columns.all_exist:
            return None
        size = (states.shape[1], keys)
        for original, known, known_size, wide in self._known:
            if original is mask and known is columns and known_size == size:
                return wide
        wide = widened(self._open(keys, states) if mask is None else mask, columns)
        self._known = [*self._known[-1:], (mask, columns, size, wide)]  # layers of two kinds have two masks
        return wide

    def _open(self, keys: int, states: torch.Tensor) -> torch.Tensor:
        """A mask that hides nothing, in a form that the layers read."""
        if self.implementation.startswith("flash"):
            return torch.ones(states.shape[0], keys, dtype=torch.long, device=states.device)
        return torch.zeros(1, 1, states.shape[1], keys, dtype=states.dtype, device=states.device)


def _with_columns(mask: Mask, columns: PrefixColumns, new_tokens: torch.Tensor, past: Cache | None, kind: str) -> Mask:
    return widened(_causal(kind, new_tokens, past) if mask is None else mask, columns, kind)


def _is_recurrent(kind: str) -> bool:
    """Whether layers of this type keep a recurrent state, whose 2D mask is about the new tokens alone."""
    return MASK_FUNCTIONS.get(kind) is create_recurrent_attention_mask


def _widened_block_mask(mask: BlockMask, p: int, visible: torch.Tensor | None) -> BlockMask:
    real_tokens, (batch, heads, query_length, key_length) = mask.mask_mod, mask.shape
    if visible is not None:
        visible = visible.expand(-1, -1, query_length, -1)

    def with_prefix(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = key < p
        if visible is not None:
            own = own & visible[row % visible.shape[0], 0, query, key.clamp(max=p - 1)]
        return own | ((key >= p) & real_tokens(row % batch, head, query, (key - p).clamp(min=0)))

    rows = batch if visible is None else max(batch, visible.shape[0])
    return create_block_mask(with_prefix, rows, heads, query_length, p + key_length, device=mask.kv_num_blocks.device)


def _causal(kind: str, new_tokens: torch.Tensor, past: Cache | None) -> torch.Tensor:
    """The boolean form of a "plainly causal" mask, which the kernel would align wrongly once there are more keys."""
    new_length = new_tokens.shape[1]
    keys = new_length
    if past is not None:
        has_window = kind != "full_attention"
        alike = [
            index
            for index, layer in enumerate(past.layers)
            if isinstance(layer, CacheLayerMixin) and past.is_sliding[index] == has_window
        ]
        keys = past.get_mask_sizes(new_length, alike[0] if alike else 0)[0]
    mask = torch.ones(1, 1, new_length, keys, dtype=torch.bool, device=new_tokens.device)
    return mask if new_length == 1 else mask.tril()
