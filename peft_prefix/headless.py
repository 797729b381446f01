"""The base without its head, and with the prefix: what transformers calls `model.base_model`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .errors import PrefixInputError


class Headless:
    """A part of the base whose forward pass reads the active prefix; everything else is the part's own.

    Trainers that compute a loss of their own (TRL's) run `model.base_model` and multiply its last hidden states with
    `model.get_output_embeddings()`. Without the prefix their loss would be that of the bare base.

    Args:
        part: The base's own `base_model`.
        run: Runs it with the prefix.
    """

    def __init__(self, part: PreTrainedModel, run: Callable[..., Any]) -> None:
        vars(self).update(_part=part, _run=run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The part's output with the active prefix."""
        return self._run(*args, **kwargs)

    forward = __call__

    def get_decoder(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as that of the whole model."""
        raise PrefixInputError("A decoder on its own would run without the prefix. Call model.base_model itself.")

    def __getattr__(self, name: str) -> Any:
        if name in ("_part", "_run"):  # a copy is being made
            raise AttributeError(name)
        return getattr(self._part, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._part, name, value)
