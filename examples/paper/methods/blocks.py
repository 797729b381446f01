"""Where a model keeps its transformer blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_prefix.example_inputs import example_inputs
from peft_prefix.structure import evaluation_mode

from .method import MethodError


def stacks(base: PreTrainedModel) -> list[nn.ModuleList]:
    """The blocks of a causal model; of an encoder-decoder model first those of the encoder, then the decoder's.

    They are the longest list of modules that is in no other list.

    Raises:
        MethodError: The model has no list of modules.
    """
    model: Any = base
    parts = [model.get_encoder(), model.get_decoder()] if base.config.is_encoder_decoder else [base]
    return [_longest(part) for part in parts]


def widths(base: PreTrainedModel, blocks: list[nn.Module]) -> list[int]:
    """How wide the hidden states are that each block hands on; seen by running the model on a token."""
    seen: dict[nn.Module, int] = {}

    def note(block: nn.Module, _: Any, output: Any) -> None:
        seen[block] = hidden_states(output).shape[-1]

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        with evaluation_mode(base), torch.no_grad():
            base(**example_inputs(base))
    finally:
        for handle in handles:
            handle.remove()
    return [seen[block] for block in blocks]


def hidden_states(output: Any) -> torch.Tensor:
    """The hidden states in a block's output, which is a tensor or begins with it."""
    states: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return states


def _longest(part: nn.Module) -> nn.ModuleList:
    found = list(_outermost(part))
    if not found:
        raise MethodError(
            f"{type(part).__name__} has no torch.nn.ModuleList, so its blocks cannot be found. Use a method that does "
            "not need them (prefix, lora, fine_tuning), or a base of transformers with a list of blocks."
        )
    return max(found, key=len)


def _outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost(child)
