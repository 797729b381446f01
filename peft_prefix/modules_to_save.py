"""Modules of the base that are trained together with a prefix, such as a classifier that starts from random numbers.

Every prefix has weights of its own for them, and the base keeps its own. They meet for the time of a forward pass: a
switch takes the place of each module's forward, and in the pass that asked for it, and there alone, a replica of the
module with the prefix's weights does the work. Nothing is exchanged in place, so passes with other prefixes or without
any may run in other threads at the same time, and a backward pass finds the tensors that the forward pass used.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import holds_adapter, is_replaced
from .backbone import head_modules
from .errors import IncompatibleBaseError, PrefixConfigError, PrefixInputError, PrefixNotConsumedError, some_of
from .processes import whole

MODULES = "modules_to_save"
"""What the names of these modules' tensors begin with, in files and in training states."""
Forward = Callable[..., Any]
"""The forward function of a module."""


class Weights:
    """Weights that act instead of the base's."""

    module_names: tuple[str, ...]
    """Full names of the base's modules that they are for."""

    def run(self, name: str, module: nn.Module, usual: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module gives with these weights.

        Args:
            name: Its name.
            module: The base's own.
            usual: Its forward with its own weights.
            args: Its arguments.
            kwargs: Its arguments by name.
        """
        raise NotImplementedError

    @contextmanager
    def in_place(self, base: PreTrainedModel) -> Iterator[None]:
        """Inside this context, and in this thread only, these weights act instead of the base's.

        Raises:
            PrefixInputError: Gradient checkpointing would compute such a module again after the context is left.
        """
        modules = {name: base.get_submodule(name) for name in self.module_names}
        for name in modules if base.training else ():
            if any(getattr(module, "gradient_checkpointing", False) for module in _around(base, name)):
                raise PrefixInputError(
                    f"Gradient checkpointing would compute {name!r} a second time with the base's own weights. Switch "
                    "it off, or leave this module out of modules_to_save."
                )
        switches = {_switch_for(module): name for name, module in modules.items()}
        before, _running.acting = _running.acting, _Acting(self, switches)
        try:
            yield
        finally:
            _running.acting = before
            for switch in switches:
                switch.release()


class ModuleWeights(nn.Module, Weights):
    """One prefix's weights for some modules of the base, named as in the base.

    They are kept in float32, as the prefix is, and rounded to the base's dtype in each pass: the small steps at the end
    of a training would be lost in bfloat16. They start as the base's own.

    Args:
        base: The base model.
        names: Full names of its modules, as `resolved_modules` gives them.

    Raises:
        PrefixConfigError: The base has no such module, or its weights cannot be trained.
    """

    def __init__(self, base: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module_names = names
        self.places, parameters = kept_places(base, names)
        """Where each parameter goes: several places where modules of the base share one parameter."""
        for place, parameter in parameters.items():
            self._add(place, parameter)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy saved tensors into the parameters."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[f"{MODULES}.{name}"])

    def saved(self) -> dict[str, torch.Tensor]:
        """The parameters by the names that they have in a file."""
        return {f"{MODULES}.{name}": parameter for name, parameter in self.named_parameters()}

    def run(self, name: str, module: nn.Module, usual: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives with these weights, for all rows."""
        return self.replica(name, module).forward(*args, **kwargs)

    def replica(self, name: str, module: nn.Module) -> nn.Module:
        """A module that shares everything with the base's module of this name except for its weights.

        Raises:
            IncompatibleBaseError: The base's module has been changed to other shapes.
        """
        same = object.__new__(type(module))
        # A forward that was set on the instance speaks of the original.
        same.__dict__ = {key: value for key, value in vars(module).items() if key not in _FORWARDS}
        weights: dict[str, Any] = dict(module._parameters)
        for own, parameter in module._parameters.items():
            if parameter is not None:
                weight = self.get_parameter(self.places[f"{name}.{own}"])
                if weight.shape != parameter.shape:
                    raise IncompatibleBaseError(
                        f"{name}.{own} of the base has shape {tuple(parameter.shape)} now, and the prefix was trained "
                        f"with {tuple(weight.shape)}. Resize before the prefix is made."
                    )
                weights[own] = weight.to(parameter.device, parameter.dtype)
        same._parameters = weights
        same._modules = {
            own: None if part is None else self.replica(f"{name}.{own}", part) for own, part in module._modules.items()
        }
        return same

    def _add(self, place: str, parameter: nn.Parameter) -> None:
        if parameter.is_meta or not parameter.is_floating_point():
            what = "not in memory (offloaded?)" if parameter.is_meta else f"of type {parameter.dtype} (quantized?)"
            raise PrefixConfigError(
                f"{place} cannot be trained, because it is {what}. Load the base with this module in memory and "
                "unquantized, or leave it out: modules_to_save=[]."
            )
        owner: nn.Module = self
        *parents, last = place.split(".")
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        weight = whole({place: parameter})[place]
        owner.register_parameter(last, nn.Parameter(weight.to(torch.float32, copy=True)))


def module_shapes(base: PreTrainedModel, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of what `ModuleWeights.saved` would give, without taking any memory for it.

    Args: as `ModuleWeights`.
    """
    return {f"{MODULES}.{place}": tuple(parameter.shape) for place, parameter in kept_places(base, names)[1].items()}


def resolved_modules(base: PreTrainedModel, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Full names of the modules to be trained.

    Args:
        base: The base model.
        wanted: Names as in `PrefixConfig.modules_to_save`; each stands for all modules that are called so or end so.

    Returns:
        The names in the base's order. What lies inside of a module is not named again.

    Raises:
        PrefixConfigError: No module has the name, or it is none that can be trained.
    """
    if wanted is None:
        # A head that an adapter trains and saves is the adapter's.
        heads = [name for name in head_modules(base) if not is_replaced(base.get_submodule(name))]
        return tuple(_without_adapter(base, name) for name in heads)
    known = [name for name, _ in base.named_modules() if name]
    found = {one: [name for name in known if name == one or name.endswith(f".{one}")] for one in wanted}
    for one, names in found.items():
        if not names:
            ends = {part for name in known for part in (name, name.rsplit(".", 1)[-1]) if not part.isdigit()}
            close = difflib.get_close_matches(one, sorted(ends), n=1)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else f"its parts are {some_of(n for n, _ in base.named_children())}."
            )
            raise PrefixConfigError(f"{type(base).__name__} has no module {one!r} for modules_to_save: {hint}")
    chosen = {name for names in found.values() for name in names}
    outermost = tuple(name for name in known if name in chosen and not _inside(name, chosen))
    for name in outermost:
        module = base.get_submodule(name)
        if type(module).forward is nn.Module.forward or next(module.parameters(), None) is None:
            what = "only a container" if type(module).forward is nn.Module.forward else "without parameters"
            raise PrefixConfigError(f"{name!r} in modules_to_save is {what}; name modules that compute with weights.")
        _without_adapter(base, name)
    return outermost


@contextmanager
def base_weights() -> Iterator[None]:
    """Inside this context, and in this thread only, the base's modules are its own."""
    before, _running.acting = _running.acting, None
    try:
        yield
    finally:
        _running.acting = before


def require_called() -> None:
    """Check that every module whose weights are in place has been used in this pass.

    Raises:
        PrefixNotConsumedError: The base ran around one.
    """
    acting = _running.acting
    idle = [] if acting is None else [name for switch, name in acting.switches.items() if switch not in acting.called]
    if idle:
        raise PrefixNotConsumedError(
            f"The base model ran without calling {some_of(idle)}, so the weights that the prefix has for it would be "
            "ignored. Leave it out of modules_to_save."
        )


class _Acting:
    """The weights that act in the current pass."""

    def __init__(self, weights: Weights, switches: dict[_Switch, str]) -> None:
        self.weights = weights
        self.switches = switches
        self.called: set[_Switch] = set()


class _Running(threading.local):
    """What acts in this thread (the compiler would take a class attribute for a constant)."""

    def __init__(self) -> None:
        self.acting: _Acting | None = None


class _Switch:
    """Stands in for a module's forward and decides, pass by pass, whose weights do the work."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # accelerate's own stand-in moves the inputs to the module's device; it is left in front.
        self.place = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self.was_set = self.place in vars(module)
        self.usual = getattr(module, self.place)
        self.passes = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        acting = _running.acting
        name = None if acting is None else acting.switches.get(self)
        if acting is None or name is None:
            return self.usual(*args, **kwargs)
        acting.called.add(self)
        return acting.weights.run(name, self.module, self.usual, args, kwargs)

    def release(self) -> None:
        """Leave the module as it was, once no pass needs the switch any more."""
        with _lock:
            self.passes -= 1
            if self.passes == 0 and self.was_set:
                setattr(self.module, self.place, self.usual)
            elif self.passes == 0:
                delattr(self.module, self.place)


_running = _Running()
_lock = threading.Lock()
_FORWARDS = ("forward", "_old_forward")


def _switch_for(module: nn.Module) -> _Switch:
    with _lock:
        switch = next(
            (vars(module)[place] for place in _FORWARDS if isinstance(vars(module).get(place), _Switch)), None
        )
        if switch is None:
            switch = _Switch(module)
            setattr(module, switch.place, switch)
        switch.passes += 1
        return cast("_Switch", switch)


def kept_places(base: PreTrainedModel, names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, nn.Parameter]]:
    """Under which name each parameter of some modules is kept, by its own name, and those that are kept."""
    places: dict[str, str] = {}
    shared: dict[nn.Parameter, str] = {}
    for name in names:
        for place, parameter in _module(base, name).named_parameters(prefix=name, remove_duplicate=False):
            places[place] = shared.setdefault(parameter, place)
    return places, {place: parameter for parameter, place in shared.items()}


def _module(base: PreTrainedModel, name: str) -> nn.Module:
    try:
        module = base.get_submodule(name)
    except AttributeError as error:
        raise PrefixConfigError(f"{type(base).__name__} has no module {name!r}.") from error
    if set(module.state_dict()) - {place for place, _ in module.named_parameters(remove_duplicate=False)}:
        raise PrefixConfigError(
            f"{name!r} has state that is not trained, such as running statistics, which all prefixes would share. "
            "Replace it, or leave it out of modules_to_save."
        )
    return module


def _without_adapter(base: nn.Module, name: str) -> str:
    if holds_adapter(base.get_submodule(name)):
        raise PrefixConfigError(
            f"An adapter of PEFT works in {name!r}, so it cannot be trained with the prefix, too. Leave it out of "
            "modules_to_save ([] for none), or out of the adapter's target_modules."
        )
    return name


def _around(base: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules of the base that a module lies in, and itself."""
    module = base
    for part in name.split("."):
        module = module.get_submodule(part)
        yield module


def _inside(name: str, modules: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts)))
