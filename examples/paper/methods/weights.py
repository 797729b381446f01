"""Training the base's own weights: all of them, or the top blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .blocks import stacks
from .method import Method, MethodError, Setting, require_positive
from .tensors import TrainedParameters


@dataclass(frozen=True)
class FineTuning(Method):
    """All weights of the base are trained and stored."""

    kind: ClassVar[str] = "fine_tuning"

    def build(self, setting: Setting) -> TrainedParameters:
        """The base itself."""
        return TrainedParameters(setting.base.requires_grad_(True))


@dataclass(frozen=True)
class TopLayers(Method):
    """Only the top transformer blocks are trained and stored, of an encoder-decoder model those of the decoder.

    Args:
        count: How many blocks.
    """

    kind: ClassVar[str] = "top_layers"
    count: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "count")

    def build(self, setting: Setting) -> TrainedParameters:
        """The base itself, frozen below.

        Raises:
            MethodError: It has not as many blocks.
        """
        blocks = stacks(setting.base)[-1]
        if self.count > len(blocks):
            raise MethodError(f"top_layers: the base has {len(blocks)} blocks, not {self.count}: use a smaller count.")
        setting.base.requires_grad_(False)
        blocks[-self.count :].requires_grad_(True)
        return TrainedParameters(setting.base)
