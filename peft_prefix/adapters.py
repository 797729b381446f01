"""Adapters of PEFT inside of a base model (LoRA and its relatives), recognized by how they are built.

PEFT puts a layer of its own around a layer of the base, which it keeps as `base_layer` (`original_module` where a
module is trained as a whole). Everything else in such a layer is the adapter's. `peft` is needed only where there are
such layers, and is imported already then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .errors import PrefixInputError

_WRAPPED = ("base_layer", "original_module")
"""What PEFT's layers call the layer of the base that they stand around."""


@dataclass(frozen=True)
class BaseParameter:
    """A parameter of a base model that may hold adapters.

    Args:
        name: Its name.
        plain_name: The same without PEFT's layers and without the adapter's name, so that it is equal on a base without
            adapters, and where an adapter has another name.
        parameter: The parameter.
        in_adapter: Whether it belongs to an adapter.
        acts: Whether it takes part in a pass as things are: an adapter may be inactive or switched off.
    """

    name: str
    plain_name: str
    parameter: nn.Parameter
    in_adapter: bool = False
    acts: bool = True


def base_parameters(base: nn.Module) -> Iterator[BaseParameter]:
    """All parameters of a base, in the order of `named_parameters`; one that is shared comes once."""
    seen: set[nn.Parameter] = set()
    for one in _walk(base, "", "", "", None):
        if one.parameter not in seen:
            seen.add(one.parameter)
            yield one


def adapter_parameters(base: nn.Module) -> dict[str, nn.Parameter]:
    """What belongs to adapters, by its name in the base: their parameters, and biases of the base that they train."""
    if not _layer_classes():
        return {}
    biases = _biases(base)
    return {one.name: one.parameter for one in base_parameters(base) if one.in_adapter or one.parameter in biases}


def trained_adapters(base: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `adapter_parameters` that are trained."""
    return {name: one for name, one in adapter_parameters(base).items() if one.requires_grad}


def freeze_base(base: PreTrainedModel) -> PreTrainedModel:
    """Freeze a base; what belongs to adapters stays as it is, trained or frozen."""
    kept = set(adapter_parameters(base).values())
    for parameter in base.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)
    return base


def is_replaced(module: nn.Module) -> bool:
    """Whether an adapter trains a copy of this module as a whole (PEFT's `modules_to_save`)."""
    classes = _layer_classes()
    return bool(classes) and isinstance(module, classes[1])


def holds_adapter(module: nn.Module) -> bool:
    """Whether an adapter works in some part of a module."""
    classes = _layer_classes()
    return bool(classes) and any(isinstance(part, classes) for part in module.modules())


def without_peft(base: Any) -> Any:
    """The transformers model inside a `PeftModel`; anything else as it is.

    Raises:
        PrefixInputError: The PEFT method does a part of its work outside of that model.
    """
    if "peft" not in sys.modules:
        return base
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if not isinstance(base, (PeftModel, PeftMixedModel)):
        return base
    tuner, configs = base.base_model, list(base.peft_config.values())
    method = ", ".join(sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs}))
    if any(config.is_prompt_learning for config in configs):
        raise PrefixInputError(
            f"The base is a PeftModel with virtual tokens of its own ({method}), which would be left out. Give the "
            "model inside it, peft_model.get_base_model(), and train a prefix instead."
        )
    works_outside = not isinstance(tuner, BaseTuner) or type(tuner).forward is not BaseTuner.forward
    if works_outside or any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        raise PrefixInputError(
            f"The base is a PeftModel whose method ({method}) does a part of its work around the transformers model, "
            "which would be left out. Use one that works inside of layers, such as LoRA."
        )
    return tuner.model


def _walk(
    module: nn.Module, name: str, plain: str, around: str, adapter: tuple[str, ...] | None
) -> Iterator[BaseParameter]:
    """The parameters of a module.

    Args:
        module: The module.
        name: Its name with a dot behind.
        plain: The same without PEFT's layers.
        around: Inside of an adapter, the plain name of the outermost of PEFT's layers.
        adapter: Outside of adapters `None`, inside of one the names of those that act.
    """
    classes = _layer_classes()
    if classes and isinstance(module, classes):
        around = plain if adapter is None else around
        adapter = _acting(module)
    for own, parameter in module._parameters.items():
        if parameter is not None:
            yield _placed(parameter, module, name, plain, own, adapter)
    for own, child in module._modules.items():
        if child is None:
            continue
        if adapter is not None and own in _WRAPPED and isinstance(module, classes):
            yield from _walk(child, f"{name}{own}.", around, "", None)
        elif adapter is not None and isinstance(module, nn.ModuleDict):
            below = (_ANY,) if own in adapter or _ANY in adapter else ()
            yield from _walk(child, f"{name}{own}.", plain, around, below)
        else:
            yield from _walk(child, f"{name}{own}.", f"{plain}{own}.", around, adapter)


def _placed(
    parameter: nn.Parameter, module: nn.Module, name: str, plain: str, own: str, adapter: tuple[str, ...] | None
) -> BaseParameter:
    if adapter is None:
        return BaseParameter(f"{name}{own}", f"{plain}{own}", parameter)
    if isinstance(module, nn.ParameterDict):
        acts = own in adapter or _ANY in adapter
        return BaseParameter(f"{name}{own}", plain.removesuffix("."), parameter, in_adapter=True, acts=acts)
    return BaseParameter(f"{name}{own}", f"{plain}{own}", parameter, in_adapter=True, acts=bool(adapter))


_ANY = ""
"""Stands for the names of all adapters, inside of one that acts."""


def _acting(layer: Any) -> tuple[str, ...]:
    """The adapters that act in one of PEFT's layers."""
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def _layer_classes() -> tuple[type, ...]:
    """The classes of PEFT's layers, around layers and around whole modules; none while it has not been imported."""
    if "peft.tuners.tuners_utils" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


def _biases(base: nn.Module) -> set[nn.Parameter]:
    """Biases of the base that adapters train and save: all of them (`bias="all"`), or those of their layers."""
    kinds = {getattr(config, "bias", "none") for config in (getattr(base, "peft_config", None) or {}).values()}
    if kinds <= {"none"}:
        return set()
    found = {one for name, one in base.named_parameters() if name.rsplit(".", 1)[-1] == "bias"}
    if "all" in kinds:
        return found
    layers: list[Any] = [layer for layer in base.modules() if isinstance(layer, _layer_classes()[0])]
    return found & {getattr(layer.get_base_layer(), "bias", None) for layer in layers}
