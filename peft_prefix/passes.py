"""Reaching the forward passes of modules inside a base model, while one call of it runs.

Hooks belong to the module, which other threads and other calls may be using, so every call is told apart by a context
variable: its hooks act for this call, in this thread, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

Entered = tuple[dict[str, Any], ExitStack]
"""Arguments of a forward pass by name, and what must be closed after it."""

_call: ContextVar[object | None] = ContextVar("_call", default=None)
"""The call of a base model that a forward pass belongs to."""


@dataclass(frozen=True)
class Intervention:
    """What happens around the forward passes of one module.

    Args:
        module: The module.
        enter: From a pass's arguments to those that the module shall get, or `None` to leave the pass alone.
        leave: From the module's output and the arguments that it got to the output that its caller shall get.
    """

    module: nn.Module
    enter: Callable[[tuple[Any, ...], dict[str, Any]], Entered | None]
    leave: Callable[[Any, dict[str, Any]], Any] | None = None


@contextmanager
def intervening(interventions: Sequence[Intervention]) -> Iterator[None]:
    """While this is open, the forward passes of some modules in this context go through interventions."""
    this_call = object()
    running: list[ExitStack] = []
    handles = []
    for intervention in interventions:
        before, after = _hooks(intervention, this_call, running)
        handles.append(intervention.module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(intervention.module.register_forward_hook(after, with_kwargs=True))
    token = _call.set(this_call)
    try:
        yield
    finally:
        _call.reset(token)
        for handle in handles:
            handle.remove()
        for stack in reversed(running):  # passes that failed
            stack.close()


def current_call() -> object | None:
    """The call of a base model that runs in this context."""
    return _call.get()


@contextmanager
def outside_of_calls() -> Iterator[None]:
    """Inside this context forward passes belong to no call, also when one is running.

    A logits processor, for instance, may call the base.
    """
    token = _call.set(None)
    try:
        yield
    finally:
        _call.reset(token)


def _hooks(
    intervention: Intervention, this_call: object, running: list[ExitStack]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    entered_here: list[Entered | None] = []

    # Another thread may call a hook while torch has noted only half of its registration, without keyword arguments.
    def before(module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if _call.get() is not this_call:
            return None
        entered = intervention.enter(args, kwargs[0])
        entered_here.append(entered)
        if entered is None:
            return None
        running.append(entered[1])
        return (), entered[0]

    def after(module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        output = kwargs_and_output[-1]
        entered = entered_here.pop() if _call.get() is this_call else None
        if entered is None:
            return output
        arguments, stack = entered
        running.remove(stack)
        with stack:
            return output if intervention.leave is None else intervention.leave(output, arguments)

    return before, after
