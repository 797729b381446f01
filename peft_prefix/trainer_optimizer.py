"""What the stock `Trainer` does differently when it optimizes a prefix: no weight decay, and norms in its log.

Importing this module adds a callback to those that every `Trainer` has, and something to do after
`Trainer.get_decay_parameter_names` and `Trainer.create_optimizer`. All do nothing where the model is no `PrefixModel`.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as trainer_module

from .bank import BankEntry
from .modules_to_save import MODULES
from .optimizer_groups import trained_by_role
from .parameterization import PrefixTensors
from .processes import is_sharded
from .trainer_integration import prefixes_in

NORM = "prefix_norm"
"""In the log: root mean square of the active prefix's keys and values."""
CHANGE = "prefix_change"
"""In the log: how far they are from where this run began, as a share of their norm at its beginning."""
_FILTERED = "_spares_prefixes"


class NormCallback(TrainerCallback):
    """Adds the norm of the active prefix, and how far it has moved, to what is logged with a training loss."""

    def __init__(self) -> None:
        self._start: dict[str, PrefixTensors] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep what the run begins with."""
        model = prefixes_in(kwargs.get("model"))
        self._start = {}
        for name, entry in model.prefixes.entries.items() if model is not None else ():
            if entry.is_trained and (numbers := _numbers(entry)) is not None:
                self._start[name] = {key: tensor.clone() for key, tensor in numbers.items()}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the norms, also to the history that the `Trainer` has just written."""
        model = prefixes_in(kwargs.get("model"))
        if logs is None or "loss" not in logs or model is None or model.prefixes.active not in self._start:
            return
        entry = model.prefixes.entry()
        now, start = _numbers(entry) if entry.is_trained else None, self._start[entry.name]
        if now is None:
            return
        change = _norm({key: tensor - start[key] for key, tensor in now.items()})
        count = sum(tensor.numel() for tensor in now.values())
        norms = {NORM: _norm(now) / count**0.5, CHANGE: change / max(_norm(start), 1e-12)}
        logs.update(norms)
        if state.log_history and "loss" in state.log_history[-1]:
            state.log_history[-1].update(norms)


def spared(model: nn.Module, names: list[str]) -> list[str]:
    """Those of the names that do not belong to a prefix's keys and values, or to the network that makes them."""
    inner = prefixes_in(model)
    if inner is None:
        return names
    own = {
        parameter
        for entry in inner.prefixes.entries.values()
        for role, parameter in trained_by_role(entry.module)
        if role != MODULES
    }
    theirs = {name for name, parameter in model.named_parameters() if parameter in own}
    return [name for name in names if name not in theirs]


def _numbers(entry: BankEntry) -> PrefixTensors | None:
    """The keys and values of a prefix as they are now; `None` if this process has only a part of them."""
    if any(map(is_sharded, entry.module.parameters())):
        return None
    with torch.no_grad():
        return {key: tensor.detach() for key, tensor in entry.module().items()}


def _norm(tensors: PrefixTensors) -> float:
    return float(torch.stack([tensor.float().square().sum() for tensor in tensors.values()]).sum().sqrt())


def _register() -> None:
    callbacks = cast("list[type[TrainerCallback]]", trainer_module.DEFAULT_CALLBACKS)
    if NormCallback not in callbacks:
        callbacks.append(NormCallback)
    if hasattr(Trainer.get_decay_parameter_names, _FILTERED):
        return
    names_of, created_by = Trainer.get_decay_parameter_names, Trainer.create_optimizer

    @functools.wraps(names_of)
    def get_decay_parameter_names(self: Trainer, model: nn.Module) -> list[str]:
        return spared(model, names_of(self, model))

    @functools.wraps(created_by)
    def create_optimizer(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        optimizer = created_by(self, *args, **kwargs)
        if prefixes_in(self.model) is not None and hasattr(optimizer, "param_groups"):
            # Where nothing decays, the first group is empty. A resumed FSDP training takes the last one for it.
            optimizer.param_groups.sort(key=lambda group: not group["params"])
        return optimizer

    setattr(get_decay_parameter_names, _FILTERED, True)
    Trainer.get_decay_parameter_names = get_decay_parameter_names  # type: ignore[method-assign]
    Trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]


_register()
