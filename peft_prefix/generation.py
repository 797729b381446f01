"""Reaching the forward passes that a base model runs inside its own `generate`.

Hooks belong to the module, which other threads and other calls may be using, so every call of `generate` is told apart
by a context variable: its hooks act for this call, in this thread, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

Entered = tuple[dict[str, Any], ExitStack]
"""Arguments of a forward pass by name, and what must be closed after it."""

_call: ContextVar[object | None] = ContextVar("_call", default=None)
"""The call of `generate` that a forward pass belongs to."""


@contextmanager
def forward_passes(
    base: nn.Module,
    enter: Callable[[tuple[Any, ...], dict[str, Any]], Entered | None],
    leave: Callable[[Any, dict[str, Any]], Any],
) -> Iterator[None]:
    """While this is open, every forward pass of the base in this context goes through two functions.

    Args:
        base: The model that is going to generate.
        enter: From the pass's arguments to those that the base shall get, or `None` to leave the pass alone.
        leave: From the base's output and its arguments to the output that `generate` shall get.
    """
    this_call = object()
    running: list[Entered | None] = []

    # Another thread may call a hook while torch has noted only half of its registration, without keyword arguments.
    def before(module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if _call.get() is not this_call:
            return None
        running.append(enter(args, kwargs[0]))
        return None if running[-1] is None else ((), running[-1][0])

    def after(module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        output = kwargs_and_output[-1]
        entered = running.pop() if _call.get() is this_call else None
        if entered is None:
            return output
        arguments, stack = entered
        with stack:
            return leave(output, arguments)

    handles = [
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True),
    ]
    token = _call.set(this_call)
    try:
        yield
    finally:
        _call.reset(token)
        for handle in handles:
            handle.remove()
        for entered in running:  # a forward pass that failed
            if entered is not None:
                entered[1].close()


@contextmanager
def outside_of_generation() -> Iterator[None]:
    """Inside this context forward passes belong to no call of `generate`, also when one is running.

    A logits processor, for instance, may call the model.
    """
    token = _call.set(None)
    try:
        yield
    finally:
        _call.reset(token)
