"""What an optimizer trains, in groups with learning rates and weight decay of their own.

Keys, values, new heads and adapters want learning rates that differ by factors of ten to a hundred. And weight decay,
which keeps weights small, pulls keys and values away from those of real words: prefixes have none unless they are given
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .adapters import trained_adapters
from .errors import PrefixInputError
from .modules_to_save import MODULES
from .parameterization import Parameterization
from .training_state import TrainingStateModel


class OptimizableModel(TrainingStateModel):
    """A model that says what an optimizer trains."""

    def optimizer_groups(
        self,
        learning_rate: float | None = None,
        *,
        key_learning_rate: float | None = None,
        value_learning_rate: float | None = None,
        module_learning_rate: float | None = None,
        adapter_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        prefix_weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Everything that is trained, in groups for an optimizer of torch.

        Args:
            learning_rate: Of the prefixes; what is recommended for each one's form, if left out.
            key_learning_rate: Of keys, if another one.
            value_learning_rate: Of values, if another one.
            module_learning_rate: Of `modules_to_save`; that of their prefix, if left out.
            adapter_learning_rate: Of adapters in the base. There is no default: it is far below a prefix's.
            weight_decay: Of `modules_to_save` and adapters.
            prefix_weight_decay: Of prefixes, towards keys and values of zero.

        Returns:
            Groups with `params`, `lr` and `weight_decay`; each trained parameter is in one of them.

        Raises:
            PrefixInputError: Nothing is trained; a rate is given for something that is not trained, or that cannot be
                told apart; or none is given for adapters that are trained.

        Example:
            >>> from transformers import GPT2Config, GPT2LMHeadModel
            >>> from peft_prefix import get_prefix_model
            >>> sizes = dict(n_layer=2, n_head=2, n_embd=8, n_positions=64, vocab_size=100)
            >>> base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
            >>> groups = get_prefix_model(base).optimizer_groups(3e-2, key_learning_rate=1e-2)
            >>> print(*(group["lr"] for group in groups))
            0.01 0.03
        """
        groups: dict[tuple[str, float], dict[str, Any]] = {}

        def add(kind: str, parameter: nn.Parameter, rate: float, decay: float) -> None:
            group = groups.setdefault((kind, rate), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)

        given = {"key": key_learning_rate, "value": value_learning_rate, MODULES: module_learning_rate}
        for entry in self.prefixes.entries.values():
            own = (
                self.prefixes.good_learning_rate(entry.config, entry.weights)
                if learning_rate is None
                else learning_rate
            )
            for role, parameter in trained_by_role(entry.module):
                if role is None and (key_learning_rate, value_learning_rate) != (None, None):
                    raise PrefixInputError(
                        f"The prefix {entry.name!r} is made by a network, which trains keys and values together: leave "
                        "key_learning_rate and value_learning_rate out."
                    )
                rate = given.get(role or "")
                decay = weight_decay if role == MODULES else prefix_weight_decay
                add(role or "network", parameter, own if rate is None else rate, decay)
        adapters = list(trained_adapters(self.base).values())
        if adapters and adapter_learning_rate is None:
            raise PrefixInputError(
                "The base has an adapter that is trained: give adapter_learning_rate (about 2e-4), or freeze it."
            )
        for parameter in adapters:
            assert adapter_learning_rate is not None
            add("adapter", parameter, adapter_learning_rate, weight_decay)
        if not groups:
            raise PrefixInputError("Nothing is trained: every prefix is frozen. Load one with is_trainable=True.")
        trained = {kind for kind, _ in groups}
        for kind, rate in {**given, "adapter": adapter_learning_rate}.items():
            if rate is not None and kind not in trained:
                raise PrefixInputError(f"A learning rate is given for {kind!r}, and nothing of that kind is trained.")
        return list(groups.values())


def trained_by_role(module: Parameterization) -> Iterator[tuple[str | None, nn.Parameter]]:
    """The trained parameters of a prefix, each with what it is: key, value, of a module, or `None` of a network."""
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        role = name.rpartition(".")[2]
        if name.startswith(f"{MODULES}."):
            yield MODULES, parameter
        else:
            yield (role if role in ("key", "value") else None), parameter
