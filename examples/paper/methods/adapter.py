"""Bottleneck adapters behind the transformer blocks (Lin et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .blocks import hidden_states, stacks, widths
from .method import Method, MethodError, Setting, require_positive
from .tensors import TrainedParameters

_NAME = "bottleneck_adapter"


class Bottleneck(nn.Module):
    """Layer norm, down-projection, ReLU and up-projection, added to what came in.

    The up-projection starts at zero, so a new adapter changes nothing.

    Args:
        width: Width of the hidden states.
        size: Width of the bottleneck.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.up(torch.relu(self.down(self.norm(states.to(self.norm.weight.dtype)))))
        return states + change.to(states.dtype)


@dataclass(frozen=True)
class Adapter(Method):
    """An adapter behind each block of the base, of the encoder's and the decoder's; the rest is frozen.

    Args:
        width: Width of the bottleneck; or
        fraction: how many numbers are trained, as a share of the base's parameters (`0.03` for 3 %).
    """

    kind: ClassVar[str] = "adapter"
    width: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "width", "fraction")
        if (self.width is None) == (self.fraction is None):
            raise ValueError("adapter: give either width (e.g. 64) or fraction (e.g. 0.03).")

    def build(self, setting: Setting) -> TrainedParameters:
        """The base, whose blocks hand their output through adapters.

        Raises:
            MethodError: The fraction is less than the smallest adapters have.
        """
        base = setting.base.requires_grad_(False)
        blocks = [block for stack in stacks(base) for block in stack]
        wide = widths(base, blocks)
        size = self.width
        if self.fraction is not None:
            size = bottleneck_for(self.fraction * sum(one.numel() for one in base.parameters()), wide)
        assert size is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            for block, width in zip(blocks, wide, strict=True):
                block.add_module(_NAME, Bottleneck(width, size).to(next(block.parameters()).device))
                block.register_forward_hook(_adapted)
        return TrainedParameters(base)


def bottleneck_for(numbers: float, wide: Sequence[int]) -> int:
    """The bottleneck with which adapters have about so many numbers altogether.

    Args:
        numbers: How many.
        wide: Width of the hidden states, for each block.

    Raises:
        MethodError: A bottleneck of one already has clearly more.
    """
    fixed, for_each = 3 * sum(wide), 2 * sum(wide) + len(wide)  # norm and the up-projection's bias; the rest
    size = round((numbers - fixed) / for_each)
    if size < 1:
        raise MethodError(
            f"adapter: the smallest adapters have {fixed + for_each:,} numbers, and the fraction asks for "
            f"{round(numbers):,}: use a larger fraction."
        )
    return size


def _adapted(block: nn.Module, _: Any, output: Any) -> Any:
    """A block's output with adapted hidden states."""
    states = block.get_submodule(_NAME)(hidden_states(output))
    return states if isinstance(output, torch.Tensor) else (states, *output[1:])
