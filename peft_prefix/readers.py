"""Who reads which prefix: all rows of a call the active one, or each row its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from transformers import PreTrainedModel

from .bank import BankEntry, PrefixBank
from .call import NO_PREFIX, RowPrefix
from .call_states import CallStates, OnePerRow, OnePrefix
from .errors import PrefixInputError
from .hidden_tokens import HiddenTokens, Hiding
from .modules_to_save import Weights
from .placement import home, is_spread, layer_devices
from .row_weights import RowWeights
from .structure import Structure

PrefixNames = Sequence[str | None]
"""The name of each row's prefix; `None` for a row without one."""


class Readers:
    """The prefixes of one call.

    Args:
        bank: All prefixes of the model.
        entries: The one that all rows read, or each row's own, `None` for a row without one; not all are `None`.
        by_row: Whether the call named them, so that another process may read others.

    Attributes:
        prefixes: What is known about them.
        weights: Their weights for modules of the base.
    """

    def __init__(self, bank: PrefixBank, entries: Sequence[BankEntry | None], by_row: bool = False) -> None:
        if len(entries) > 1 and all(entry is entries[0] for entry in entries):
            entries = entries[:1]
        used = {entry.name: entry for entry in entries if entry is not None}
        bank.require_usable({name: entry.module for name, entry in used.items()}, by_row)
        self.bank = bank
        self.entries = entries
        known = {name: _row_prefix(entry, bank) for name, entry in used.items()}
        self.prefixes: list[RowPrefix] = [NO_PREFIX if entry is None else known[entry.name] for entry in entries]
        weights = [None if entry is None else entry.weights for entry in entries]
        self.weights: Weights = weights[0] if len(weights) == 1 and weights[0] is not None else RowWeights(weights)

    @property
    def vary(self) -> bool:
        """Whether lengths or sites differ between rows."""
        first = self.prefixes[0]
        return any((one.length, one.sites) != (first.length, first.sites) for one in self.prefixes)

    def hidden(self, arguments: Mapping[str, Any]) -> HiddenTokens | None:
        """Which virtual tokens the rows of one call do not see; `None` while nothing is trained that hides any.

        Args:
            arguments: The call's arguments by name.
        """
        hidings = [Hiding(0) if entry is None else entry.hiding for entry in self.entries]
        return HiddenTokens(hidings, arguments) if self.bank.training and any(one.acts for one in hidings) else None

    def states(self, base: PreTrainedModel, structure: Structure) -> CallStates:
        """Their keys and values, for one call of a base."""
        dropouts = [entry.config.dropout if entry is not None and self.bank.training else 0.0 for entry in self.entries]
        modules = [None if entry is None else entry.module for entry in self.entries]
        first = modules[0]
        if len(modules) == 1 and first is not None:
            # A prefix that moves with its base is there already.
            device = home(base) if first.stays_behind else None
            return OnePrefix(first, dropouts[0], device, _devices(base, structure) if device else {})
        geometry = self.bank.geometry.only(site for prefix in self.prefixes for site in prefix.sites)
        return OnePerRow(modules, dropouts, geometry, home(base), _devices(base, structure))


def named_entries(
    bank: PrefixBank, names: object, arguments: Mapping[str, Any], default_rows: int | None = None
) -> list[BankEntry | None]:
    """The prefixes of a call by their names, one for each row.

    Args:
        bank: All prefixes of the model.
        names: What the user gave.
        arguments: The arguments of the call by name, to see how many rows it has.
        default_rows: How many it has without inputs.

    Raises:
        PrefixInputError: It is no list of names, or not one for each row.
        PrefixConfigError: There is no prefix of a name.
    """
    if isinstance(names, (str, Mapping, Set)) or not isinstance(names, Iterable):
        raise PrefixInputError(
            f'prefix_names is a list with one name for each row, such as ["a", "b", None], not {names!r}.'
        )
    names = list(names)
    strange = [name for name in names if name is not None and not isinstance(name, str)]
    if strange or not names:
        raise PrefixInputError(
            "prefix_names is empty: one name for each row is needed."
            if not names
            else f"A name in prefix_names is a string, or None for a row without a prefix, not {strange[0]!r}."
        )
    entries = [None if name is None else bank.entry(name) for name in names]
    rows = rows_of(arguments) or default_rows
    if rows is not None and rows != len(names):
        raise PrefixInputError(f"prefix_names has {len(names)} names for {rows} rows: one for each row is needed.")
    return entries


_INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "inputs", "encoder_outputs")
"""What a model reads, under its usual names."""


def rows_of(arguments: Mapping[str, Any]) -> int | None:
    """How many rows a call has, if its arguments show it."""
    for name in (*_INPUTS, *(f"decoder_{name}" for name in _INPUTS)):
        value = arguments.get(name)
        if value is not None:
            states = value if isinstance(value, torch.Tensor) else value[0]
            return int(states.shape[0])
    return None


def _row_prefix(entry: BankEntry, bank: PrefixBank) -> RowPrefix:
    config = entry.config
    return RowPrefix(config.num_virtual_tokens, config.sites or (), entry.owner(bank), config.sliding_window)


def _devices(base: PreTrainedModel, structure: Structure) -> dict[tuple[str, int], torch.device]:
    return layer_devices(base, structure) if is_spread(base) else {}
