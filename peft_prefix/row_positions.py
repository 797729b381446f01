"""Positions in decoders that count their cache, where rows have prefixes of different lengths.

Most decoders take `position_ids`, one for each token of each row. Those of BART's kind know only the length of their
cache, and hand it to the module that knows their positions. There each row gets what it would get alone: the module
runs once for each length.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .arguments import by_name
from .call import PrefixCall
from .passes import Entered, Intervention

_COUNT = "past_key_values_length"
"""What such modules call the number of entries in the cache."""
_POSITIONS = (_COUNT, "position_ids")
"""What they read positions from."""


def position_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder that are told how long its cache is."""
    return [module for module in decoder.modules() if _COUNT in inspect.signature(module.forward).parameters]


def positions_by_row(decoder: nn.Module, call: PrefixCall) -> list[Intervention]:
    """What gives every row positions behind its own prefix."""
    return [_by_row(module, call) for module in position_modules(decoder)]


def _by_row(module: nn.Module, call: PrefixCall) -> Intervention:
    names = tuple(inspect.signature(module.forward).parameters)

    def enter(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entered:
        return by_name(names, args, kwargs), None

    def leave(output: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        assert call.cache is not None
        rows, longest = call.rows_of_pass, call.length("decoder")
        lengths = call.columns("decoder", rows, output.device).lengths
        assert lengths is not None
        result = _expanded(output, rows)
        for length in {prefix.at("decoder") for prefix in call.prefixes} - {longest}:
            given = {name: arguments[name] for name in _POSITIONS if arguments.get(name) is not None}
            earlier = {name: value - (longest - length) for name, value in given.items()}
            own = _expanded(module.forward(**{**arguments, **earlier}), rows)
            result = torch.where((lengths == length)[:, None, None], own, result)
        return result

    return Intervention(module, enter, leave)


def _expanded(positions: torch.Tensor, rows: int) -> torch.Tensor:
    """What a module gives, `(new, hidden)` or `(1 or rows, new, hidden)`, for each row."""
    return positions.expand(rows, *positions.shape[-2:])
