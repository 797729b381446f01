"""Where a base model computes, when `device_map` has spread it over devices or put parts of it aside.

Such a base has hooks of accelerate: they bring a module's inputs, and its weights from the CPU's memory or from disk,
to the device where it runs. Its own parameters are then on no device ("meta") between two passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from .structure import Structure


def home(base: PreTrainedModel) -> torch.device:
    """Where a base takes its inputs; "meta" only if its weights are nowhere at all."""
    device: torch.device = base.device
    return device if device.type != "meta" else _device_of(base) or device


def can_run(base: nn.Module) -> bool:
    """Whether all weights of a base are somewhere, in memory or put aside."""
    return all(not weight.is_meta or put_aside(base, name) is not None for name, weight in base.named_parameters())


def put_aside(base: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter that is kept in the CPU's memory or on disk while no pass needs it; `None` if this one is not."""
    *parents, _ = path = name.split(".")
    for depth in range(len(parents), -1, -1):  # a module's own hook, or that of one around it
        for hook in _hooks(base.get_submodule(".".join(path[:depth]))):
            inside = ".".join(path[depth:])
            if hook.offload and hook.weights_map is not None and (depth == len(parents) or hook.place_submodules):
                weight: torch.Tensor = hook.weights_map[inside]
                return weight
    return None


def weight_of(base: nn.Module, parameter: torch.Tensor) -> torch.Tensor:
    """A parameter of the base, wherever it is kept."""
    if not parameter.is_meta:
        return parameter
    name = next(name for name, one in base.named_parameters(remove_duplicate=False) if one is parameter)
    kept = put_aside(base, name)
    return parameter if kept is None else kept


def repeated_names(base: nn.Module) -> set[str]:
    """Names of parameters that are one with another, earlier one, as far as putting them aside has hidden it."""
    tied: dict[str, str] = getattr(base, "all_tied_weights_keys", None) or {}
    earliest: dict[str, str] = {}
    repeated = set()
    for name, weight in base.named_parameters():
        group = tied.get(name, name)
        if earliest.setdefault(group, name) != name and weight.is_meta:
            repeated.add(name)
    return repeated


def layer_devices(base: PreTrainedModel, structure: Structure) -> dict[tuple[str, int], torch.device]:
    """The device where each attention layer that a prefix reaches runs, by site and layer."""
    layers: dict[tuple[str, int], nn.Module] = {}
    for attention in structure.self_attention:
        layers.setdefault(("decoder", attention.index), attention.module)
    for attention in structure.cross_attention:
        layers.setdefault(("cross", attention.index), attention.module)
    for attention in structure.encoder_attention:
        layers["encoder", attention.index] = attention.module
    for index, layout in enumerate(structure.written_out):
        layers["encoder", index] = layout.module
    return {place: _device_of(module) or home(base) for place, module in layers.items()}


def is_spread(base: PreTrainedModel) -> bool:
    """Whether `device_map` has put layers on different devices."""
    return len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1


def _device_of(module: nn.Module) -> torch.device | None:
    for part in module.modules():
        for hook in _hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    return None


def _hooks(module: nn.Module) -> Iterator[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook):
            yield one
