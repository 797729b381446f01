"""Learning rates that work, and warnings for a first step that leaves a directly trained prefix where it started.

Keys and values that are parameters themselves need steps some hundred times larger than weights do. The Trainer's
default of 5e-5 moves them so little that training looks broken, which is the most common way to fail with this method.
Much rarer, no gradient arrives at all: some kernels of quantized bases are made for generation and have no backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .config import Reparameterization
from .errors import PrefixWarning

GOOD_LEARNING_RATE = 3e-2
"""A learning rate for a direct prefix of a causal model and an Adam-like optimizer."""

GOOD_LEARNING_RATE_ENCODER_DECODER = 1e-1
"""The same for an encoder-decoder model."""

GOOD_LEARNING_RATE_OF_NETWORK = 1e-3
"""The same for the reparameterization's network."""

GOOD_LEARNING_RATE_WITH_MODULES = 1e-2
"""The same where modules of the base, such as a new head, are trained with a direct prefix."""

SMALLEST_USEFUL_LEARNING_RATE = 1e-3
"""Below this a direct prefix hardly moves in thousands of steps."""


def good_learning_rate(reparameterization: Reparameterization, *, is_encoder_decoder: bool, has_modules: bool) -> float:
    """What worked well in our measurements (docs/results.md) for an Adam-like optimizer.

    Args:
        reparameterization: The prefix's form.
        is_encoder_decoder: Whether the base has an encoder.
        has_modules: Whether modules of the base are trained with the prefix.
    """
    if reparameterization == "mlp":
        return GOOD_LEARNING_RATE_OF_NETWORK
    if has_modules:
        return GOOD_LEARNING_RATE_WITH_MODULES
    return GOOD_LEARNING_RATE_ENCODER_DECODER if is_encoder_decoder else GOOD_LEARNING_RATE


class LearningRateWatch:
    """Looks once, at the first optimizer step that contains the given parameters: at its rate and for gradients.

    Args:
        parameters: The keys and values that are trained directly.
        good_rate: What to recommend.
        of_prefixes: Gives the parameters of all prefixes of the model: where another one learns, this one may be idle.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        good_rate: float = GOOD_LEARNING_RATE,
        of_prefixes: Callable[[], Iterable[torch.nn.Parameter]] = tuple,
    ) -> None:
        self.good_rate = good_rate
        self.of_prefixes = of_prefixes
        self._parameters = WeakIdKeyDictionary(dict.fromkeys(parameters))
        self._done = False
        self._handle = register_optimizer_step_pre_hook(self._look)

    def stop(self) -> None:
        """Stop looking."""
        self._handle.remove()

    def _look(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # The hook stays registered until `stop`: removing it here would change the list that is being walked.
        own = [
            group
            for group in ([] if self._done else optimizer.param_groups)
            if any(parameter in self._parameters for parameter in group["params"])
        ]
        if not own:
            return
        self._done = True
        if not any(given is not None for given in (*args[1:], *kwargs.values())):  # no closure to find them
            self._look_for_gradients(optimizer)
        # A scheduler's warm-up starts near zero; it leaves the peak in "initial_lr".
        rate = max(float(max(group["lr"], group.get("initial_lr", 0.0))) for group in own)
        if rate < SMALLEST_USEFUL_LEARNING_RATE:
            warnings.warn(
                f"The learning rate {rate:g} will hardly move a prefix of plain keys and values. Use about "
                f"{self.good_rate:g} (TrainingArguments(learning_rate={self.good_rate:g})), or "
                'PrefixConfig(reparameterization="mlp") for small ones.',
                PrefixWarning,
                stacklevel=2,
            )

    def _look_for_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own = [one for one in parameters if one in self._parameters and one.requires_grad]
        reached = sum(parameter.grad is not None for parameter in own)
        is_idle = reached == 0 and any(parameter.grad is not None for parameter in self.of_prefixes())
        if reached == len(own) or is_idle:
            return
        warnings.warn(
            f"The optimizer makes its first step, and no gradient has reached {len(own) - reached} of the prefix's "
            f"{len(own)} tensors. Either nothing called backward(), or an operation of the base has no backward: for "
            "example, bitsandbytes' 4-bit layers on a CPU are for generation only.",
            PrefixWarning,
            stacklevel=3,
        )
