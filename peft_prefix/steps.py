"""Counting the steps that optimizers make with a parameter.

A tensor counts changes in place itself, but not those that a fused optimizer makes, and that is the Trainer's default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def changes(parameters: Iterable[torch.Tensor]) -> int:
    """A number that grows when one of these changes, by a step of an optimizer or in place."""
    return sum(_steps.get(one, 0) + (0 if one.is_inference() else one._version) for one in parameters)


def _count(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                _steps[parameter] = _steps.get(parameter, 0) + 1


register_optimizer_step_post_hook(_count)
