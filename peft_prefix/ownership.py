"""Which prefix the tokens of a cache, or the states of an encoder, were read with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from .errors import PrefixInputError

_OWNER = "_prefix_owner"
"""Attribute of a user's cache or tensor that says which prefix it was made with."""


@dataclass(frozen=True)
class Owner:
    """A prefix with the numbers that it has now.

    Args:
        label: What to call it; another prefix, or another state of it, has another one.
    """

    label: str

    def __deepcopy__(self, _: Any) -> Owner:
        """Itself: the copy of a cache was made with the same prefix."""
        return self


def owner_of_rows(owners: Sequence[Owner | None]) -> Owner | None:
    """Who owns a batch whose rows have these owners; rows with the same one make a batch as if it were active."""
    if all(owner == owners[0] for owner in owners[1:]):
        return owners[0]
    return Owner(" | ".join("none" if owner is None else owner.label for owner in owners))


def claim(cache: Cache, owner: Owner | None) -> None:
    """Note that the tokens of a cache are read with this prefix (or with none), after checking that all were.

    Raises:
        PrefixInputError: The cache holds tokens that were read in another way.
    """
    require_owner(cache, owner)
    setattr(cache, _OWNER, owner)


def require_owner(cache: Cache, owner: Owner | None) -> None:
    """Check that every token of a cache was read with this prefix (or with none, if `owner` is `None`).

    Raises:
        PrefixInputError: The cache holds tokens that were read in another way, so continuing it would be wrong.
    """
    if torch.compiler.is_exporting():
        return  # an exported program's cache is plain tensors, of which nobody can say where they come from
    found: Owner | None = getattr(cache, _OWNER, None)
    if torch.compiler.is_compiling():  # labels change with every training step, which would be compiled again each time
        known = (found is None) == (owner is None) or cache.is_compileable
    else:
        known = found == owner
    if known or cache.get_seq_length() == 0:
        return
    read_with = "without a prefix" if found is None else f"with prefix {found.label}"
    wanted = "without a prefix" if owner is None else f"with prefix {owner.label}"
    raise PrefixInputError(
        f"This cache holds {int(cache.get_seq_length())} tokens that were read {read_with} and cannot be continued "
        f"{wanted}. Pass an empty cache, or one that was returned under the same prefix."
    )


def sign_encoding(output: Any, owner: Owner | None) -> None:
    """Note that an encoder's output was made with this prefix."""
    if not torch.compiler.is_compiling():  # there it would be lost, and the encoding refused
        setattr(_hidden_states(output), _OWNER, owner)


def require_encoding(output: Any, owner: Owner | None) -> None:
    """Check that an encoder's output was made with this prefix (or with none, if `owner` is `None`).

    Raises:
        PrefixInputError: It was not, so the encoder's prefix would be missing, or another one would act.
    """
    if torch.compiler.is_compiling():  # marks of tensors are not seen there
        return
    found: Owner | None = getattr(_hidden_states(output), _OWNER, None)
    if found == owner:
        return
    made_with = (
        "are not known to come from this model's encoder prefix: they were made without it, or changed since (clone, "
        "slice, dtype)"
        if found is None
        else f"were made with prefix {found.label}"
    )
    remedy = "base.get_encoder()(...)" if owner is None else "model.get_encoder()(...)"
    raise PrefixInputError(
        f"These encoder_outputs {made_with}. Make them with {remedy}, and pass them on as they are, or pass the "
        "encoder's inputs instead."
    )


def _hidden_states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0]
    return states
