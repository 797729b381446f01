"""Virtual tokens that a row does not see while it is trained: dropped ones, and a demonstration that it is itself.

What is hidden is decided once in a call, so that all sites, layers and passes agree, and a layer that runs again in the
backward pass, too. Hiding is a matter of masks (`masks.py`): keys, values and positions stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .cache import RowOrder
from .errors import PrefixInputError
from .leave_one_out import KnownDemonstrations
from .masks import PrefixColumns


@dataclass(frozen=True)
class Hiding:
    """What may be hidden of the prefix of a row.

    Args:
        length: Its length `p`.
        token_dropout: Probability with which each of its virtual tokens is hidden.
        keeps_first: Whether its virtual token 0 is never dropped.
        demonstrations: Those that it was made of and that are hidden from themselves, if any are.
    """

    length: int
    token_dropout: float = 0.0
    keeps_first: bool = False
    demonstrations: KnownDemonstrations | None = None

    @property
    def acts(self) -> bool:
        """Whether anything may be hidden at all."""
        return self.token_dropout > 0 or self.demonstrations is not None


class HiddenTokens:
    """Which virtual tokens the rows of one call do not see.

    Args:
        hidings: What may be hidden from all rows, or from each one.
        arguments: The call's arguments by name, by which demonstrations are recognized.
    """

    def __init__(self, hidings: Sequence[Hiding], arguments: Mapping[str, Any]) -> None:
        self.hidings = hidings
        self.arguments = arguments
        self.longest = max(hiding.length for hiding in hidings)
        self._rows = 0
        self._dropped: torch.Tensor | None = None

    def settle(self, rows: int, device: torch.device) -> None:
        """Draw which tokens are dropped in this number of rows, unless it is done.

        Random numbers come from torch's generator of the device, as those of any dropout.
        """
        if self._rows:
            return
        self._rows = rows
        hidings = self._of(rows)
        if not any(hiding.token_dropout for hiding in hidings):
            return
        rates = torch.tensor([hiding.token_dropout for hiding in hidings], device=device)
        dropped = torch.rand(rows, self.longest, device=device) < rates[:, None]
        if any(hiding.keeps_first for hiding in hidings):
            first = torch.tensor(
                [self.longest - hiding.length if hiding.keeps_first else -1 for hiding in hidings], device=device
            )
            dropped = dropped & (torch.arange(self.longest, device=device) != first[:, None])
        self._dropped = dropped

    def at(self, site: str, length: int, rows: int, device: torch.device) -> torch.Tensor | None:
        """Which virtual tokens each row does not see at a site, `(rows, length)`; `None` if all see all.

        Prefixes of different lengths end together, in the last column.

        Raises:
            PrefixInputError: There are other rows than the call began with, and not a multiple of them.
        """
        self.settle(rows, device)
        hidden = self._dropped
        for known in dict.fromkeys(hiding.demonstrations for hiding in self.hidings):
            own = None if known is None else known.hidden_from(self.arguments, site)
            if own is None:
                continue
            own = _repeated(nn.functional.pad(own, (self.longest - own.shape[1], 0)).to(device), self._rows)
            reads = torch.tensor([one.demonstrations is known for one in self._of(self._rows)], device=device)
            own = own & reads[:, None]
            hidden = own if hidden is None else hidden | own
        if hidden is None:
            return None
        return _repeated(hidden, rows)[:, self.longest - length :]

    def _of(self, rows: int) -> Sequence[Hiding]:
        copies = rows // len(self.hidings)
        return [hiding for hiding in self.hidings for _ in range(copies)]


class HidingMasks:
    """Masks of attention layers with columns hidden in them, each made once although every layer asks for it.

    For decoders that count their tokens in the 2D mask (Bloom and its like, for their biases by distance): a zero there
    would move the tokens before it.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Any, PrefixColumns, int, Any]] = []

    def hidden(self, mask: Any, columns: PrefixColumns, keys: int, order: RowOrder | None, states: torch.Tensor) -> Any:
        """A layer's mask in which the hidden columns are hidden; the mask itself if none are.

        Args:
            mask: 2D, 4D (boolean or additive) or block mask with the prefix's columns, or `None`, which hides nothing.
            columns: The prefix's columns.
            keys: Number of keys, those of the prefix included.
            order: Where each row's prefix stands if not in front.
            states: Hidden states `(batch, tokens, hidden)`, for their dtype and device.
        """
        if columns.hidden is None:
            return mask
        for original, known, known_keys, made in self._known:
            if original is mask and known is columns and known_keys == keys:
                return made
        hidden = nn.functional.pad(columns.hidden, (0, keys - columns.length)).to(states.device)
        if order is not None:
            hidden = hidden.gather(1, order.indices(keys).to(hidden.device))
        if mask is None:
            mask_or_open: Any = torch.zeros(1, 1, states.shape[1], keys, dtype=states.dtype, device=states.device)
        else:
            mask_or_open = mask
        made = _without(mask_or_open, hidden)
        self._known = [*self._known[-1:], (mask, columns, keys, made)]
        return made


def _without(mask: torch.Tensor | BlockMask, hidden: torch.Tensor) -> torch.Tensor | BlockMask:
    """A mask in which the keys `(batch, keys)` are hidden."""
    if isinstance(mask, BlockMask):
        own, (rows, heads, queries, keys) = mask.mask_mod, mask.shape

        def seen(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return ~hidden[row, key] & own(row % rows, head, query, key)

        return create_block_mask(seen, hidden.shape[0], heads, queries, keys, device=mask.kv_num_blocks.device)
    if mask.dim() == 2:
        return mask.masked_fill(hidden, 0)
    columns = hidden[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & ~columns
    return mask.masked_fill(columns, torch.finfo(mask.dtype).min)


def _repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Each row as often as it takes to have this many.

    Raises:
        PrefixInputError: They are no multiple.
    """
    copies, rest = divmod(count, rows.shape[0])
    if rest or not copies:
        raise PrefixInputError(
            f"The base goes on with {count} rows where it began with {rows.shape[0]}, and which virtual tokens each of "
            "them does not see cannot be told. Train without token_dropout and leave_one_out here."
        )
    return rows if copies == 1 else rows.repeat_interleave(copies, dim=0)
