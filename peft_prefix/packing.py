"""Packed texts: several texts one after another in one row, told apart by positions that start again.

Collators that pack (`DataCollatorWithFlattening`, TRL's) can say the same twice more: as lengths for flash attention
and as the number of each token's text, for recurrent layers. A prefix stands before every text and changes those
numbers, and the layers that would read them are refused with a prefix. So they are compared with the positions and left
out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.masking_utils import find_packed_sequence_indices

from .errors import PrefixInputError

REPEATS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that say again where packed texts begin."""


def is_packed(positions: torch.Tensor) -> bool:
    """Whether positions `(batch, new)` start again somewhere."""
    return find_packed_sequence_indices(positions) is not None


def without_repeats(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments without those that repeat what `position_ids` say.

    Raises:
        PrefixInputError: They say something else, or there are no `position_ids`.
    """
    repeats = {name: arguments[name] for name in REPEATS if arguments.get(name) is not None}
    rest = {name: value for name, value in arguments.items() if name not in REPEATS}
    if not repeats:
        return rest
    positions = rest.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        raise PrefixInputError(
            f"{', '.join(repeats)} tell where packed texts begin; with a prefix position_ids must tell it, which start "
            "again at 0 with each text (DataCollatorWithFlattening(return_position_ids=True))."
        )
    for name, expected in _as_the_positions_say(positions).items():
        given = repeats.get(name)
        if given is not None and not torch.equal(torch.as_tensor(given).cpu().long(), expected):
            raise PrefixInputError(
                f"{name} and position_ids disagree about where packed texts begin. Leave {name} out: with a prefix the "
                "positions alone count."
            )
    return rest


def _as_the_positions_say(positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each of the repeats must be."""
    rows = positions.cpu()
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[:, 1:] = rows.diff() != 1
    places = begins.flatten().nonzero()[:, 0]
    borders = torch.cat([places, torch.tensor([rows.numel()])])
    longest = borders.diff().max()
    return {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": begins.long().cumsum(dim=1) - 1,
    }
