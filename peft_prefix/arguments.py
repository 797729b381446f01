"""Reading the arguments of a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .errors import PrefixInputError


def by_name(names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of one call by name, where `names` are the parameters in their order."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def new_tokens_of(arguments: Mapping[str, Any]) -> torch.Tensor:
    """The new tokens of a pass, as ids `(batch, new)` or as embeddings `(batch, new, hidden)`.

    Raises:
        PrefixInputError: There are none, or both.
    """
    given = [arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None]
    if len(given) != 1:
        raise PrefixInputError(
            "Pass either input_ids or inputs_embeds (in an encoder-decoder model: decoder_input_ids, "
            "decoder_inputs_embeds or labels)."
        )
    tokens: torch.Tensor = given[0]
    return tokens
