"""Gradient checkpointing: layers that run again in the backward pass, when the call that they belong to is over.

A checkpointed layer gets no cache from its model, and what it reads is computed twice. So each of its attention layers
is given the prefix directly, in the first run and in the second, by the same interventions; and the prefix's keys and
values go through the checkpoint as inputs, so that gradients reach them whichever way it works (reentrant or not).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .call import PrefixCall
from .passes import Intervention, current_call, intervening

Slot = tuple[str, int]
"""A site and a layer."""
_FUNCTION = "_gradient_checkpointing_func"
"""What transformers calls the checkpoint function that it puts on modules."""
_FUNCTIONS = threading.RLock()
"""Held while these are changed: they belong to the base, whichever thread runs it."""


def is_checkpointed(modules: Iterable[nn.Module]) -> bool:
    """Whether some of these modules will run again in the backward pass."""
    return any(module.training and getattr(module, "gradient_checkpointing", False) for module in modules)


def is_reentrant(base: nn.Module) -> bool:
    """Whether gradients flow only through the positional inputs of checkpointed layers."""
    functions = [vars(module)[_FUNCTION] for module in base.modules() if _FUNCTION in vars(module)]
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)


class Checkpoints:
    """What happens to checkpointed layers in one call of the base.

    Args:
        interventions: Those at attention layers and inside of them.
        slots: Which attention layer reads which part of the prefix.
        call: The call.
        around: Must be open while a layer runs.
    """

    def __init__(
        self,
        interventions: Sequence[Intervention],
        slots: dict[nn.Module, Slot],
        call: PrefixCall,
        around: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.interventions = interventions
        self.slots = slots
        self.call = call
        self.around = around

    @contextmanager
    def acting(self, base: nn.Module) -> Iterator[None]:
        """While this is open, the base's checkpoints are made with the prefix."""
        with _FUNCTIONS:
            holders = [module for module in base.modules() if _FUNCTION in vars(module)]
            originals = [vars(module)[_FUNCTION] for module in holders]
            call = current_call()
            for module, original in zip(holders, originals, strict=True):
                setattr(module, _FUNCTION, self._checkpoint_with_prefix(original, call))
            try:
                yield
            finally:
                for module, original in zip(holders, originals, strict=True):
                    setattr(module, _FUNCTION, original)

    def _checkpoint_with_prefix(self, original: Callable[..., Any], call: object) -> Callable[..., Any]:
        def checkpoint(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if current_call() is not call:  # another thread, or the base without its prefix
                return original(run, *args, **kwargs)
            inside = set(_layer_of(run).modules())
            slots = [slot for module, slot in self.slots.items() if module in inside]
            mine = [one for one in self.interventions if one.module in inside]
            rows = _rows(run, args)
            states = [tensor for slot in slots for tensor in self.call.prefix(*slot, rows)]

            def layer(*inputs: Any) -> Any:
                own = inputs[len(inputs) - len(states) :]
                for place, slot in enumerate(slots):
                    self.call.replay(slot, (own[2 * place], own[2 * place + 1]))
                with ExitStack() as stack:
                    if current_call() is not call:  # in the backward pass
                        stack.enter_context(intervening(mine))
                        stack.enter_context(self.around())
                    return run(*inputs[: len(inputs) - len(states)])

            return original(layer, *args, *states, **kwargs)

        return checkpoint


def _rows(run: Any, args: tuple[Any, ...]) -> int:
    """Batch size of what a layer is given."""
    given = [*args, *getattr(run, "keywords", {}).values()]
    return next(int(value.shape[0]) for value in given if isinstance(value, torch.Tensor) and value.dim() == 3)


def _layer_of(run: Any) -> nn.Module:
    """The layer that a function runs: a bound method of it, or a partial of one, or of a function of it."""
    inner = getattr(run, "func", run)
    owner = getattr(inner, "__self__", None)
    if isinstance(owner, nn.Module):
        return owner
    for first in getattr(run, "args", ())[:1]:
        if isinstance(first, nn.Module):
            return first
    raise TypeError(f"{run!r} runs no layer that could be recognized")
