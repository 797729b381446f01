"""New prefixes out of others: one after another, or their mean.

Keys are taken as they are stored. They carry the rotary positions `0..p-1` that each prefix was trained with, and those
are not turned: in a concatenation several virtual tokens have the same position, and all of them are before the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from .bank import BankEntry, PrefixBank
from .config import PrefixConfig
from .errors import PrefixConfigError, PrefixInputError, some_of
from .modules_to_save import MODULES
from .parameterization import PrefixTensors

SMALLEST_SUM = 1e-6
"""Weights whose sum is smaller than this part of their magnitude have no mean."""


@dataclass(frozen=True)
class Composed:
    """What a new prefix out of others looks like.

    Args:
        config: Its configuration.
        tensors: Its keys and values, and weights for modules of the base, named as in a file.
    """

    config: PrefixConfig
    tensors: PrefixTensors


def concatenation(bank: PrefixBank, names: Iterable[str]) -> Composed:
    """The keys and values of several prefixes, one after another.

    Args:
        bank: The prefixes.
        names: Which of them, in this order.

    Raises:
        PrefixConfigError: The names cannot be, or the prefixes do not go together.
        PrefixInputError: A prefix holds NaN or infinity.
    """
    entries = _sources(bank, names)
    for entry in entries:
        if entry.weights.module_names:
            raise PrefixConfigError(
                f"The prefix {entry.name!r} has weights of its own for {some_of(entry.weights.module_names)}, and a "
                "concatenation could use one prefix's only. Take prefixes that were made with modules_to_save=[], or "
                "average_prefixes, which averages such weights."
            )
    tensors = _combined(bank, entries, lambda parts: torch.cat(parts, dim=1))
    return Composed(_config(entries, sum(entry.config.num_virtual_tokens for entry in entries)), tensors)


def average(bank: PrefixBank, names: Iterable[str], weights: Iterable[float] | None) -> Composed:
    """The weighted mean of several prefixes of the same length, with their weights for modules of the base.

    Args:
        bank: The prefixes.
        names: Which of them.
        weights: One for each; equal ones if left out. They are divided by their sum.

    Raises:
        PrefixConfigError: The names or weights cannot be, or the prefixes do not go together.
        PrefixInputError: A prefix holds NaN or infinity.
    """
    entries = _sources(bank, names)
    shares = _shares(weights, len(entries))
    _require_same(entries, "lengths", [entry.config.num_virtual_tokens for entry in entries], _OTHER_LENGTHS)
    modules = [tuple(entry.weights.places.items()) for entry in entries]
    _require_same(entries, "modules_to_save", [dict(one) for one in modules], _OTHER_MODULES)

    def mean(parts: list[torch.Tensor]) -> torch.Tensor:
        first, *others = (share * part.float() for share, part in zip(shares, parts, strict=True))
        return sum(others, first)

    return Composed(_config(entries, entries[0].config.num_virtual_tokens), _combined(bank, entries, mean))


def start_from(bank: PrefixBank, config: PrefixConfig, name: str | None) -> BankEntry | None:
    """The prefix that a new one starts from; `None` if it starts from something else.

    Args:
        bank: The prefixes.
        config: The new one's, complete.
        name: The name that was given.

    Raises:
        PrefixConfigError: There is no such prefix, it has another length or other sites, or the config names another
            initializer.
    """
    if config.init != "prefix":
        if name is not None:
            raise PrefixConfigError(
                f'initial_prefix is given, but init={config.init!r} does not read it: use init="prefix".'
            )
        return None
    if name is None:
        raise PrefixConfigError(
            'init="prefix" needs the prefix to start from: pass initial_prefix="..." to add_prefix.'
            if bank.entries
            else 'init="prefix" starts from another prefix, and the model has none yet. Make or load that one first, '
            'then call add_prefix(name, config, initial_prefix="...").'
        )
    entry = bank.entry(name)
    if entry.config.num_virtual_tokens != config.num_virtual_tokens:
        raise PrefixConfigError(
            f"The prefix {name!r} has {entry.config.num_virtual_tokens} virtual tokens, the new one "
            f"{config.num_virtual_tokens}. Set num_virtual_tokens={entry.config.num_virtual_tokens}."
        )
    if entry.module.sites != config.sites:
        raise PrefixConfigError(
            f"The prefix {name!r} acts at {_listed(entry.module.sites)}, the new one at {_listed(config.sites or ())}. "
            f"Set sites={list(entry.module.sites)}."
        )
    return entry


def shared_weights(entry: BankEntry, saved: PrefixTensors, places: Iterable[str]) -> PrefixTensors:
    """A prefix's weights for those parameters of the base that another prefix has weights for, too.

    Args:
        entry: The prefix.
        saved: What its file would contain.
        places: Names of the base's parameters that the other one has weights for.

    Returns:
        The weights by the names that they have in the other one's file.
    """
    known = entry.weights.places
    return {f"{MODULES}.{place}": saved[f"{MODULES}.{known[place]}"] for place in places if place in known}


def _sources(bank: PrefixBank, names: Iterable[str]) -> list[BankEntry]:
    """The prefixes of these names, which have the same sites and treat windows alike."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise PrefixConfigError(f"names must be a list of prefixes' names, not {names!r}.")
    chosen = list(names)
    if len(chosen) < 2:
        raise PrefixConfigError(
            f"Two prefixes are needed at least, not {chosen!r}. For a copy of one, "
            'add_prefix(name, PrefixConfig(init="prefix", ...), initial_prefix=...).'
        )
    entries = [bank.entry(_named(name)) for name in chosen]
    repeated = [name for place, name in enumerate(chosen) if name in chosen[:place]]
    if repeated:
        raise PrefixConfigError(
            f"{some_of(map(repr, repeated))} is named more than once. Give it a larger weight in a mean; for a "
            'concatenation with itself make a copy first, with PrefixConfig(init="prefix").'
        )
    _require_same(entries, "sites", [entry.module.sites for entry in entries], _OTHER_SITES)
    _require_same(entries, "sliding_window", [entry.config.sliding_window for entry in entries], _OTHER_WINDOWS)
    return entries


def _combined(
    bank: PrefixBank, entries: Sequence[BankEntry], combine: Callable[[list[torch.Tensor]], torch.Tensor]
) -> PrefixTensors:
    """Each tensor of the prefixes, combined where the first one's is."""
    saved = [bank.saved(entry) for entry in entries]
    for entry, tensors in zip(entries, saved, strict=True):
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise PrefixInputError(
                f"The prefix {entry.name!r} holds NaN or infinity in {some_of(broken)}: its training diverged. Go back "
                "to an earlier checkpoint of it."
            )
    return {name: combine([one[name].to(first.device) for one in saved]) for name, first in saved[0].items()}


def _config(entries: Sequence[BankEntry], num_virtual_tokens: int) -> PrefixConfig:
    """What prefixes have in common, for a new one of plain keys and values."""
    configs = [entry.config for entry in entries]
    return PrefixConfig(
        num_virtual_tokens=num_virtual_tokens,
        init="prefix",
        dropout=configs[0].dropout if len({config.dropout for config in configs}) == 1 else 0.0,
        token_dropout=configs[0].token_dropout if len({config.token_dropout for config in configs}) == 1 else 0.0,
        freeze_first_token=all(config.freeze_first_token for config in configs),
        sites=entries[0].module.sites,  # type: ignore[arg-type]  # names of sites
        sliding_window=configs[0].sliding_window,
        modules_to_save=entries[0].weights.module_names,
    )


def _shares(weights: object, count: int) -> list[float]:
    """The weights as parts of one."""
    if weights is None:
        return [1 / count] * count
    given = list(weights) if isinstance(weights, Iterable) and not isinstance(weights, str) else None
    if given is None or not all(isinstance(one, Real) and not isinstance(one, bool) for one in given):
        raise PrefixConfigError(f"weights must be a list of numbers, one for each prefix, not {weights!r}.")
    numbers = [float(one) for one in given]
    if len(numbers) != count:
        raise PrefixConfigError(f"There are {len(numbers)} weights for {count} prefixes: one for each is needed.")
    if not all(map(math.isfinite, numbers)):
        raise PrefixConfigError(f"weights must be finite, not {numbers}.")
    total, size = math.fsum(numbers), math.fsum(map(abs, numbers))
    if abs(total) <= SMALLEST_SUM * size:
        raise PrefixConfigError(
            f"The weights {numbers} add up to {total:g}, and a mean divides by their sum. Choose weights whose sum is "
            "not zero."
        )
    return [one / total for one in numbers]


_OTHER_LENGTHS = "A mean needs the same num_virtual_tokens; concatenate_prefixes takes any lengths."
_OTHER_MODULES = "A mean needs weights for the same modules, or for none."
_OTHER_SITES = "Make them with the same sites=[...]."
_OTHER_WINDOWS = (
    'Choose one behaviour: a copy made with PrefixConfig(init="prefix", sliding_window=...) may have the other.'
)


def _require_same(entries: Sequence[BankEntry], what: str, values: Sequence[object], remedy: str) -> None:
    for entry, value in zip(entries, values, strict=True):
        if value != values[0]:
            raise PrefixConfigError(
                f"The prefixes {entries[0].name!r} and {entry.name!r} have different {what}: {_shown(values[0])} and "
                f"{_shown(value)}. {remedy}"
            )


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return some_of(sorted(value)) or "none"
    return _listed(value) if isinstance(value, tuple) else repr(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _named(name: object) -> str:
    if not isinstance(name, str):
        raise PrefixConfigError(f"names must be a list of prefixes' names, and {name!r} is none.")
    return name
