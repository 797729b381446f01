"""Reaching the forward passes of modules inside a base model, while one call of it runs.

Hooks belong to the module, which other threads and other calls may be using. So a hook does nothing by itself: it looks
up the call that runs in its thread and does what that call says about its module.

The hooks stay on the module, because the compiler notices neither new nor removed ones. It does notice which call is
running: it guards what it has read from `_running`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Entered = tuple[dict[str, Any], AbstractContextManager[Any] | None]
"""Arguments of a forward pass by name, and what is open while it runs, if anything is."""


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


class _Call:
    """One call of a base model.

    Args:
        interventions: What happens in it, module by module.
    """

    def __init__(self, interventions: Iterable[Intervention]) -> None:
        self.interventions: dict[nn.Module, list[Intervention]] = {}
        for one in interventions:
            self.interventions.setdefault(one.module, []).append(one)
        self.passes: list[tuple[nn.Module, list[Intervention], list[AbstractContextManager[Any]]]] = []

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        taken: list[Intervention] = []
        around: list[AbstractContextManager[Any]] = []
        self.passes.append((module, taken, around))
        for one in self.interventions[module]:
            entered = one.enter(args, kwargs)
            if entered is None:
                continue
            args, kwargs = (), entered[0]
            taken.append(one)
            if entered[1] is not None:
                entered[1].__enter__()
                around.append(entered[1])
        return args, kwargs

    def leave(self, module: nn.Module, kwargs: dict[str, Any], output: Any) -> Any:
        while self.passes[-1][0] is not module:  # passes that failed inside this one
            self.close()
        for one in reversed(self.passes[-1][1]):
            if one.leave is not None:
                output = one.leave(output, kwargs)
        self.close()
        return output

    def close(self) -> None:
        for one in reversed(self.passes.pop()[2]):
            one.__exit__(None, None, None)


class _Running(threading.local):
    """The call that the forward passes in this thread belong to.

    The attribute must be set here: the compiler takes class attributes of thread-local objects for constants. (It does
    not trace context variables at all.)
    """

    def __init__(self) -> None:
        self.call: _Call | None = None


_running = _Running()


class _Gate:
    """The hooks of one module.

    Args:
        module: Gets the hooks.
    """

    def __init__(self, module: nn.Module) -> None:
        self.handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True),
        ]

    def before(
        self, module: nn.Module, args: tuple[Any, ...], *kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = _running.call
        # Another thread may call a hook while torch has noted only half of its registration, without the keywords.
        if call is None or module not in call.interventions:
            return None
        return call.enter(module, args, kwargs[0])

    def after(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
        call = _running.call
        if call is None or module not in call.interventions:
            return None
        return call.leave(module, kwargs_and_output[0], kwargs_and_output[-1])


_gates = threading.Lock()
"""Held while gates are put on modules."""


def keep_gates(modules: Iterable[nn.Module]) -> None:
    """Make these modules ready for interventions; they do nothing while no call asks for any."""
    with _gates:
        for module in modules:
            if not _gates_of(module):
                _Gate(module)


def remove_gates(base: nn.Module) -> None:
    """Leave no gate on a model that is not used with prefixes."""
    for module in base.modules():
        for gate in _gates_of(module):
            for handle in gate.handles:
                handle.remove()


@contextmanager
def intervening(interventions: Sequence[Intervention]) -> Iterator[None]:
    """While this is open, the forward passes of some modules in this thread go through interventions."""
    call, before = _Call(interventions), _running.call
    if not torch.compiler.is_compiling():  # what is compiled has all of its gates
        keep_gates(call.interventions)
    _running.call = call
    try:
        yield
    finally:
        _running.call = before
        while call.passes:  # they failed
            call.close()


def current_call() -> object | None:
    """The call of a base model that runs in this thread."""
    return _running.call


@contextmanager
def outside_of_calls() -> Iterator[None]:
    """Inside this context forward passes belong to no call, also when one is running.

    A logits processor, for instance, may call the base.
    """
    before, _running.call = _running.call, None
    try:
        yield
    finally:
        _running.call = before


def _gates_of(module: nn.Module) -> list[_Gate]:
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, _Gate)]
