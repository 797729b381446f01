"""Demonstrations that a prefix was made of, and which rows of a batch they are.

A row that is itself a demonstration would find its own target in the prefix and learn to copy it. So the prefix keeps
its demonstrations' token ids, in the training state only, and rows are compared with them (context tuning, Lu et al.
2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import PrefixFileError

LEAVE_ONE_OUT = "demonstrations"
"""Name of the module that keeps them, inside of a prefix."""
_PADDING = -1
"""Stands for tokens that are none, in comparisons."""
_SOURCE_SITES = ("encoder", "cross")
"""Sites that are filled with what is read; in an encoder-decoder model the decoder is filled with the targets."""


@dataclass(frozen=True)
class Demonstration:
    """One demonstration, and where it stands in a prefix.

    Args:
        ids: Token ids of its text, or of its source.
        target: Token ids of its target, in an encoder-decoder model.
        slots: Virtual tokens that were made of `ids`, in increasing order.
        target_slots: Virtual tokens of the decoder's prefix that were made of `target`.
    """

    ids: tuple[int, ...]
    target: tuple[int, ...] | None
    slots: tuple[int, ...]
    target_slots: tuple[int, ...] = ()


class KnownDemonstrations(nn.Module):
    """The demonstrations of one prefix; a part of its training state, and of no published file.

    Args:
        num_virtual_tokens: Length `p` of the prefix.
        known: The demonstrations; none until the training state is loaded.
    """

    def __init__(self, num_virtual_tokens: int, known: Sequence[Demonstration] = ()) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.known = tuple(known)

    def hidden_from(self, arguments: Mapping[str, Any], site: str) -> torch.Tensor | None:
        """Which virtual tokens each row of a batch must not see at a site, `(rows, p)`; `None` if nothing is known.

        A row is a demonstration if its real input ids contain that one's. In an encoder-decoder model its labels must
        contain the target, too, or what the decoder reads, where the trainer keeps the labels to itself. A row without
        ids is none.

        Args:
            arguments: The call's arguments by name.
            site: The site.
        """
        ids = arguments.get("input_ids")
        if not self.known or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return None
        mask = arguments.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, _PADDING)
        hidden = torch.zeros(ids.shape[0], self.num_virtual_tokens, dtype=torch.bool, device=ids.device)
        for one in self.known:
            is_one = _contain(ids, one.ids)
            if one.target is not None:
                is_one = is_one & _write(arguments, one.target, ids.device)
            slots = one.slots if one.target is None or site in _SOURCE_SITES else one.target_slots
            own = torch.zeros(self.num_virtual_tokens, dtype=torch.bool)
            own[list(slots)] = True
            hidden = hidden | (is_one[:, None] & own.to(ids.device))
        return hidden

    def get_extra_state(self) -> torch.Tensor:
        """All of it as numbers: for each demonstration four lengths (-1 for no target), then what has those lengths."""
        numbers: list[int] = []
        for one in self.known:
            target = -1 if one.target is None else len(one.target)
            numbers += [len(one.ids), target, len(one.slots), len(one.target_slots)]
            numbers += [*one.ids, *(one.target or ()), *one.slots, *one.target_slots]
        return torch.tensor(numbers, dtype=torch.int64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take the demonstrations of a training state.

        Raises:
            PrefixFileError: The numbers are no demonstrations of this prefix.
        """
        self.known = read_demonstrations(state, self.num_virtual_tokens)


def _write(arguments: Mapping[str, Any], target: tuple[int, ...], device: torch.device) -> torch.Tensor | bool:
    """Which rows have this target, `(rows,)`; true where nothing says which they have."""
    # The decoder reads a target one place later, and so not its end.
    for name, wanted in (("labels", target), ("decoder_input_ids", target[:-1])):
        given = arguments.get(name)
        if wanted and isinstance(given, torch.Tensor) and given.dim() == 2:
            return _contain(given.to(device), wanted)
    return True


def _contain(rows: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """Which rows `(rows, tokens)` contain some ids, one directly behind the other, `(rows,)`."""
    if len(wanted) > rows.shape[1]:
        return torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    there = rows.unfold(1, len(wanted), 1) == torch.tensor(wanted, device=rows.device)
    return there.all(dim=-1).any(dim=-1)


def read_demonstrations(state: torch.Tensor, num_virtual_tokens: int) -> tuple[Demonstration, ...]:
    """The demonstrations of a training state.

    Args:
        state: What `KnownDemonstrations.get_extra_state` gave.
        num_virtual_tokens: Length `p` of the prefix.

    Raises:
        PrefixFileError: The numbers are no demonstrations of such a prefix.
    """
    numbers = state.tolist() if state.dim() == 1 and state.dtype == torch.int64 else None
    known: list[Demonstration] = []
    while numbers:
        lengths = numbers[:4]
        sizes = [max(length, 0) for length in lengths]
        end = 4 + sum(sizes)
        if len(lengths) < 4 or min(lengths) < -1 or lengths[0] < 1 or lengths[1] == 0 or end > len(numbers):
            numbers = None
            break
        parts, place = [], 4
        for size in sizes:
            parts.append(tuple(numbers[place : place + size]))
            place += size
        if not all(0 <= slot < num_virtual_tokens for slot in (*parts[2], *parts[3])):
            numbers = None
            break
        known.append(Demonstration(parts[0], parts[1] if lengths[1] > 0 else None, parts[2], parts[3]))
        numbers = numbers[end:]
    if numbers is None:
        raise PrefixFileError(
            "The training state is damaged: what it says about demonstrations does not fit the prefix. Go back to an "
            "earlier checkpoint."
        )
    return tuple(known)
